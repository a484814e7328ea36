# `./dev WORD` installs what a Debian machine lacks and then runs `make WORD`.
GO ?= go
export CGO_ENABLED = 0

# go test, and then a line for each of the tests that took longest. Without vet, which takes a minute
# of two processors on a fresh machine: lint has all of it.
GOTEST = $(GO) run ./guest-tests/cmd/gotest -vet=off

# Flags of tests that need no names for a debugger: they link faster.
BARE = -ldflags='-s -w'

# The packages whose tests always start the lab, and the others.
LAB = ./guest-tests/lab ./guest-tests/linux ./devices/scsi/lio ./devices/virtio/vhostring ./devices/virtio/vhostscsi
UNIT = $(KVM:./%=gvm/%) $(filter-out $(KVM:./%=gvm/%),$(shell $(GO) list ./... | grep -v $(LAB:.%=-e gvm%$$)))

# The packages of UNIT whose tests need /dev/kvm, and start the lab where there is none. They come
# first: at the end a lab would keep one processor and leave the other idle. Their machines take
# minutes there, and with the race detector longer than CI has: racelab runs gvm with it.
KVM = ./cmd/gvm ./vmm ./machine ./kvmapi
RACE = $(if $(wildcard /dev/kvm),$(UNIT),$(filter-out $(KVM:./%=gvm/%),$(UNIT)))

# Parts of libraries that the program leaves out: the command line library's documents, whose
# Markdown parser takes time at each start, and HTTP/2, which a control socket does not speak.
TAGS = urfave_cli_no_docs,nethttpomithttp2

# Packages that run seldom are compiled without inlining, which makes the program smaller. Not those
# whose variables the compiler then no longer initializes, such as net/http.
SELDOM = archive/tar crypto/... debug/... encoding/asn1 encoding/json encoding/xml flag fmt \
	github.com/urfave/cli/v2 gvm/broker gvm/cmd/gvm gvm/control gvm/devices/i6300esb \
	gvm/devices/pvpanic gvm/devices/rtc gvm/devices/scsi/lio gvm/devices/scsi/trace \
	gvm/devices/statusport gvm/devices/virtio/net/tap gvm/devices/virtio/replay \
	gvm/devices/virtio/vhostnet gvm/devices/virtio/vhostring gvm/devices/virtio/vhostscsi \
	gvm/devices/virtio/vhostvsock gvm/gdbstub gvm/guest/agent gvm/guest/agent/archive \
	gvm/guest/initramfs gvm/guest/kernel gvm/inspect gvm/jail gvm/kvmapi/vhost gvm/machine \
	gvm/machine/disk gvm/sandbox gvm/testrun/... gvm/verdict/... gvm/vmm/acpi gvm/vmm/boot \
	gvm/vmm/vmcore internal/zstd log math/big mime/... net net/netip net/textproto net/url os/exec \
	reflect regexp/syntax text/tabwriter text/template/... vendor/golang.org/...

# Where build puts the programs.
BIN = bin

# The version of a release; without it gvm has that of cmd/gvm/main.go. Functions begin at multiples
# of 16 bytes and not of 32, which takes 156 kB less and no time.
VERSION =
LDFLAGS = -s -w -funcalign=16$(if $(VERSION), -X main.version=$(VERSION))

# Those of man too, which then compiles nothing that build has compiled, and neither does a build in
# another directory.
BUILDFLAGS = -trimpath -buildvcs=false -ldflags '$(LDFLAGS)' $(SELDOM:%=-gcflags=%=-l)

# Where install puts what it makes: gvm is $(DESTDIR)$(PREFIX)/bin/gvm.
PREFIX = /usr/local
DESTDIR =
ZSHDIR = share/zsh/site-functions

.PHONY: build run demo test lab-setup test-unit test-lab long long-machines long-guests long-rings long-package test-all user lint race racelab fuzz soak conformance vhost kernel debuggers distribution kubernetes streams model blktests xfstests bench guest clean
.PHONY: man stage install uninstall deb
.PHONY: release vulncheck fuzz-long fuzz-table

# gvm knows the build ID of its agent: see cmd/gvm/agent.go.
build: ## static binaries: bin/gvm, bin/gvm-agent for its guests, bin/gvm-plot for its plots, and bin/gvm-net, its network
	$(GO) build -tags $(TAGS) $(BUILDFLAGS) -o $(BIN)/ ./cmd/gvm-agent ./cmd/gvm-plot ./cmd/gvm-net
	id=$$($(GO) tool buildid $(BIN)/gvm-agent) && \
	$(GO) build -tags $(TAGS) $(BUILDFLAGS) -ldflags "$(LDFLAGS) -X main.agentID=$$id" -o $(BIN)/ ./cmd/gvm

run: ## boot the embedded guest; in the lab if this machine has no /dev/kvm
	@if [ -e /dev/kvm ]; then set -x; $(GO) run ./cmd/gvm run; else \
		echo 'run: in the lab, as this machine has no /dev/kvm' >&2; \
		mkdir -p $(BIN) && $(GO) build -o $(BIN)/ ./cmd/gvm && $(GO) run ./guest-tests/cmd/lab -- $(abspath $(BIN))/gvm run; fi

demo: ## boot a stock Debian kernel to a shell, here or in the lab
	$(GO) run ./guest-tests/cmd/demo

# A part that fails does not keep the others from running. The lab is fetched first: on a slow network
# that takes longer than the tests, whose time is bounded.
test: ## the tests of every day; those that need a real KVM run in the lab where there is none
	@$(MAKE) -k -j1 lab-setup test-unit test-lab

lab-setup:
	$(GO) run ./guest-tests/cmd/lab setup

test-unit:
	$(GOTEST) $(BARE) -timeout 40m -skip '^Test(DebianPackage|$(RELEASE)|$(SLOW))$$|$(KINDS)' $(KVM) $(ONELAB) $(UNIT)
	cd guest-tests/kubernetes && $(GO) test ./manifest

# The tests that compile gvm and the library with the flags of a release.
RELEASE = SameBytes|Size

# Tests of KVM and of the lab that take longest without /dev/kvm.
SLOW = APICIDs|Bench(Boot|Footprint|Guest)|CrashCore|CrashCoreSignals|DiskCommandsSandbox|EndOfSanitize|EverySignal|Guest|Halted|JailUserNet|JailVhost|KilledInJournal|MainInLab|RunKVM|RunWedged|TestEnds

# The conformance suite on other kinds of disk.
KINDS = ^TestTarget$$/^(4096|thick|readonly)$$

# The packages of LAB that mostly have one lab at a time, which keeps one processor busy: they run
# beside cmd/gvm, whose labs wait now and then.
ONELAB = ./guest-tests/lab ./devices/scsi/lio ./devices/virtio/vhostscsi

# The tests with Linux guests that take longest: many guests each, or large ones.
LONG = ^Test(Bisect|Command|CrashKernel|Escapes|EscapesOfUser|Exec|Faults|FreePageReporting|HighAPICIDs|HVC|INTx|InitrdAbove4GiB|Killed|Mapped|Matrix|MemoryCgroup|Net|NetUser|PowerButton|Reboot|RootWord|Roots|Rungs|SMP|Share|StopsUnderLoad|TestSignals|VhostDeaths|VhostFilesystems|VhostIdle|VhostLives|VhostPlug|VhostPlugSandbox|VhostTools|VhostVsock|VsockBridge)$$

# Its two labs use two processors. Two guests at a time in one lab are what loses guests: -parallel 1.
test-lab:
	$(GOTEST) $(BARE) -timeout 30m -parallel 1 -skip '$(LONG)' ./guest-tests/linux

# What the kernel's vhost-scsi serves is tested on three kernels; on the second and third in a
# short form, of what differs between them. `make vhost` has all of it.
LONG6.12 = Vhost(ABI|Deaths|Endings|Equivalence|Filesystems|Plug|Told|Tools)
LONG7.3 = Vhost(ABI|Equivalence|Filesystems|Plug)

# The packages that are tested on these kernels as well.
TARGETS6.12 = ./devices/virtio/vhostscsi ./devices/scsi/lio
TARGETS7.3 = ./devices/virtio/vhostscsi

long: ## the tests with Linux guests that take longest, the kernel's devices under load, other kinds of disk, the build of a release, and other kernels for the host
	@$(MAKE) -k -j1 long-machines long-guests long-rings long-package long-6.12 long-7.3

long-machines:
	$(GOTEST) $(BARE) -timeout 30m -run '^Test($(SLOW))$$' $(KVM) ./guest-tests/lab

long-guests:
	$(GOTEST) $(BARE) -timeout 30m -p 1 -parallel 1 -run '$(LONG)' ./guest-tests/linux

long-rings:
	$(GOTEST) $(BARE) -timeout 30m ./devices/virtio/vhostring

long-package:
	$(GOTEST) $(BARE) -timeout 30m -run '^Test(DebianPackage|$(RELEASE))$$' . ./packaging ./guest-tests/lab
	$(GOTEST) $(BARE) -timeout 30m -run '$(KINDS)' ./guest-tests/conformance

long-6.12 long-7.3: long-%:
	GVM_TEST_L1=$* $(GOTEST) $(BARE) -timeout 30m -p 1 -parallel 1 -run '$(LONG$*)' -skip 'Filesystems/^[12]_|VhostPlugSandbox/jail' ./guest-tests/linux
	GVM_TEST_L1=$* $(GOTEST) $(BARE) -timeout 30m -p 2 $(TARGETS$*)

# GVM_TEST_USER: see guest-tests/lab/README.md.
user: export GVM_TEST_USER = 65534
user: ## the tests of machines and those with Linux guests again, with gvm as an ordinary user, in the lab
	@$(MAKE) -k -j1 user-machines user-guests

user-machines:
	$(GOTEST) $(BARE) -timeout 30m -p 1 $(KVM)

user-guests:
	$(GOTEST) $(BARE) -timeout 60m -parallel 1 ./guest-tests/linux

# All words that test something. One that fails does not keep the others from running.
ALL ?= test model long user lint race distribution kernel debuggers kubernetes streams vhost conformance soak fuzz release racelab
test-all: ## test, and then all the rest; what took longest comes at the end
	@times=$$(mktemp) failures=$$(mktemp) || exit 1; export GVM_TEST_TIMES=$$times GVM_TEST_FAILURES=$$failures; failed=; \
	for word in $(ALL); do echo "test-all: $$word"; $(MAKE) $$word || failed="$$failed $$word"; done; \
	echo "test-all: what took longest:"; sort -rn $$times | head -n 30; cat $$failures; rm $$times $$failures; \
	test -z "$$failed" || { echo "test-all: failed:$$failed" >&2; exit 1; }

# The packages that have tests with the tag built.
BUILT = ./guest-tests/linux ./devices/virtio/virtq

lint: ## gofmt, go vet, staticcheck
	@out=$$(gofmt -l $$(git ls-files '*.go')); test -z "$$out" || { echo "gofmt would change: $$out"; exit 1; }
	$(GO) vet ./...
	$(GO) tool staticcheck ./...
	$(GO) vet -tags built $(BUILT)
	$(GO) tool staticcheck -tags built $(BUILT)
	$(GO) vet -tags man ./cmd/gvm
	$(GO) tool staticcheck -tags man ./cmd/gvm

# Without what takes most of the time: gvm's benchmarks run as programs, two tests that start gvm
# hundreds of times, the conformance suite on other kinds of disk, the builds of a release, and
# most of the exhaustive tests.
race: ## the unit tests under the race detector
	CGO_ENABLED=1 $(GOTEST) -race -timeout 40m -skip '^TestBench(Boot|Footprint|Guest)$$|^Test(CompletionOfDisks|Verbs)$$|^TestEvery(Table|MSIXSequence)$$|^TestEveryInterleaving$$/^2|$(KINDS)|^Test($(RELEASE))$$' $(RACE)

# gvm itself has the detector there as well, and ends when it finds something. Static, for
# guests, which get diskload, have no C library; xz without, which would decompress a kernel
# for minutes.
# A Debian package is built without the detector, which needs cgo.
# RACELAB is of which packages, RUN of which tests.
RACELAB ?= $(LAB)
RUN ?= .
racelab: export GORACE = halt_on_error=1
racelab: export GOFLAGS = -race "-ldflags=-linkmode=external -extldflags=-static" -gcflags=github.com/mikelolasagasti/xz=-race=false
racelab: ## what runs in the lab under the race detector, gvm and all
	CGO_ENABLED=1 $(GOTEST) -timeout 60m -p 1 -parallel 1 -run '$(RUN)' -skip '^TestDebianPackage$$' $(RACELAB)

# A count and not a time: with a time, go test can fail at its end with "context deadline
# exceeded" and no finding (go.dev/issue/75804).
FUZZTIME ?= 5000x
fuzz: ## every fuzz target, FUZZTIME each
	@grep -rHo '^func Fuzz[A-Za-z0-9_]*' --include='*_test.go' . | sed 's|/[^/]*:func | |' | sort | \
	while read -r pkg target; do \
	  echo "fuzz $$pkg $$target"; \
	  $(GO) test -run '^$$' -fuzz "^$$target$$" -fuzztime $(FUZZTIME) -fuzzminimizetime 1x $$pkg </dev/null || exit 1; \
	done

# It takes most of a day: not a word of ALL.
FUZZMINUTES ?= 30
FUZZ ?= .
FUZZPARALLEL ?= 0
fuzz-long: ## the fuzz targets that FUZZ=REGEXP matches, FUZZMINUTES=30 each; goes on after an interruption
	$(GO) run ./guest-tests/cmd/fuzz -time $(FUZZMINUTES)m -run '$(FUZZ)' -parallel $(FUZZPARALLEL)

fuzz-table: ## add new fuzz targets to docs/fuzzing.md, and measure those again that FUZZ=REGEXP matches
	$(GO) run ./guest-tests/cmd/fuzz -table -run '$(if $(filter-out .,$(FUZZ)),$(FUZZ),^$$)'

soak: ## kill gvm 200 times while its guest writes, and look for what was lost
	GVM_TEST_KILLS=40 $(GO) test -run TestKilledInJournal -count=1 -timeout 30m -v ./cmd/gvm

conformance: ## libiscsi's suite in Linux guests on gvm's, the kernel's and QEMU's target, in the lab
	$(GO) test -run '^$$' -bench BenchmarkConformance -benchtime 1x -timeout 60m -v ./guest-tests/linux

vhost: ## all guests' tests of what the kernel serves, on three of the lab's kernels
	$(GOTEST) -count=1 -timeout 30m -p 1 -parallel 1 -run Vhost ./guest-tests/linux
	for k in 6.12 7.3; do GVM_TEST_L1=$$k $(GOTEST) -count=1 -timeout 30m -p 1 -parallel 1 -run Vhost ./guest-tests/linux || exit 1; done

kernel: ## build small kernels of Debian's source, and run the guests' tests that need it, in the lab
	$(GO) run ./guest-tests/cmd/lab kernel
	$(GO) test -tags built -count=1 -timeout 30m -parallel 1 -run '^TestBuilt' -v ./guest-tests/linux

debuggers: ## crash and gdb on the core of a stock kernel that panicked, and gdb on one that KASLR moved, with debug symbols
	$(GOTEST) -tags built -count=1 -timeout 15m -run '^TestDebuggers$$' ./guest-tests/lab
	$(GOTEST) -tags built -count=1 -timeout 15m -run '^TestGDBMoved$$' ./guest-tests/linux

distribution: ## make a small Debian system, and boot it to its login and down again, in the lab
	$(GO) run ./guest-tests/cmd/lab distribution
	$(GOTEST) -tags built -count=1 -timeout 40m -parallel 1 -run '^TestDistribution$$' ./guest-tests/linux

# The build of Kubernetes takes 10 minutes of two processors, once.
kubernetes: ## run a Job of gvm test --emit kubernetes on Kubernetes's control plane, built from its source
	cd guest-tests/kubernetes && $(GO) test -trimpath -count=1 -timeout 90m -v .

streams: ## 64 MiB through commands in guests and back, and 1 GiB by vsock, in the lab
	$(GOTEST) -tags built -count=1 -timeout 30m -parallel 1 -run '^Test(Vsock)?Streams$$' ./guest-tests/linux

model: ## every state of the model of the split virtqueue, by spin
	$(GO) test -tags built -count=1 -timeout 10m -run '^TestModel$$' -v ./devices/virtio/virtq

# Suites of Linux's own tests, whose sources are elsewhere: not words of ALL. SUITE runs one, of the
# tests that TESTS names or else the second argument. With CONTINUE=1 it keeps the outcomes of the run before.
SUITE = @test -x '$($(1))/check' || { echo '$@: $(1)=DIR names no source of it: git clone $(3)' >&2; exit 2; }; \
	mkdir -p bench && $(if $(CONTINUE),,rm -f bench/$(5).json &&) $(MAKE) -C '$($(1))' && $(1)='$(abspath $($(1)))' TESTS='$(or $(TESTS),$(2))' FSTYP=$(FSTYP) \
	$(GOTEST) -tags built -count=1 -timeout 24h -parallel 1 -v -outputdir bench -run '^$(4)$$' ./guest-tests/linux

blktests: ## blktests' block and scsi groups, or TESTS, on disks of gvm's and QEMU's, in the lab: BLKTESTS=DIR; CONTINUE=1 goes on
	$(call SUITE,BLKTESTS,block scsi,https://github.com/linux-blktests/blktests,TestBlktests,blktests)

FSTYP ?= ext4
xfstests: ## xfstests' quick group, or TESTS, on the same disks: XFSTESTS=DIR, FSTYP=ext4, CONTINUE=1
	$(call SUITE,XFSTESTS,quick,https://git.kernel.org/pub/scm/fs/xfs/xfstests-dev.git,TestXfstests,xfstests-$(FSTYP))

# The system's QEMU and the lab's, which the benchmarks of Linux fetch before.
LAB_CACHE = $(or $(GVM_LAB_CACHE),$(or $(XDG_CACHE_HOME),$(HOME)/.cache)/gvm-lab)
QEMUS = --qemu qemu-system-x86_64 --qemu $(LAB_CACHE)/qemu/bin/qemu-system-x86_64

bench: build ## benchmarks without a guest, of Linux in the lab, and of this host's KVM; JSON and plots in bench/
	mkdir -p bench
	bin/gvm bench disk --json bench/disk.json --plot bench/disk.svg
	$(GO) test -run '^$$' -bench . -benchmem $(UNIT)
	$(GO) run ./guest-tests/cmd/lab distribution
	$(GO) test -tags built -run '^$$' -bench 'Boot|Disk|Distribution|Net|Share|TestTrue' -benchtime 3x -timeout 150m -v -outputdir bench ./guest-tests/linux
	bin/gvm bench guest $(QEMUS) --json bench/guest.json --plot bench/guest.svg
	bin/gvm bench boot $(QEMUS) --json bench/boot.json
	bin/gvm bench footprint $(QEMUS) --json bench/footprint.json

guest: ## rebuild the embedded guest's image, and the init of measured boots
	$(MAKE) -C guest/embedded
	$(MAKE) -C guest/bootinit

# The date in what is installed is the commit's: a commit, built by one version of Go, makes one package.
man stage deb: export SOURCE_DATE_EPOCH ?= $(shell git log -1 --format=%ct 2>/dev/null || stat -c %Y CHANGELOG.md)

man: ## man pages, in bin/man
	rm -rf $(BIN)/man
	mkdir -p $(BIN)/man
	$(GO) run -tags man,$(TAGS) $(BUILDFLAGS) ./cmd/gvm $(BIN)/man

# The files of install, as they are below PREFIX.
STAGE = $(BIN)/stage
stage: build man
	rm -rf $(STAGE)
	install -D -m 755 -t $(STAGE)/bin $(BIN)/gvm $(BIN)/gvm-agent $(BIN)/gvm-plot $(BIN)/gvm-net
	install -D -m 644 -t $(STAGE)/share/man/man1 $(BIN)/man/*.1
	gzip -9n $(STAGE)/share/man/man1/*.1
	install -d $(STAGE)/share/bash-completion/completions $(STAGE)/$(ZSHDIR) $(STAGE)/share/fish/vendor_completions.d
	$(BIN)/gvm completion bash >$(STAGE)/share/bash-completion/completions/gvm
	$(BIN)/gvm completion zsh >$(STAGE)/$(ZSHDIR)/_gvm
	$(BIN)/gvm completion fish >$(STAGE)/share/fish/vendor_completions.d/gvm.fish
	install -d $(STAGE)/share/doc/gvm
	GO='$(GO)' packaging/copyright.sh >$(STAGE)/share/doc/gvm/copyright
	gzip -9nc CHANGELOG.md >$(STAGE)/share/doc/gvm/CHANGELOG.md.gz
	chmod -R u=rwX,go=rX $(STAGE)

# A user builds, and sudo copies where the user may not write.
SUDO = $(shell d='$(DESTDIR)$(PREFIX)'; while [ ! -e "$$d" ]; do d=$$(dirname "$$d"); done; [ -w "$$d" ] || echo sudo)
EACH_FILE = sudo='$(SUDO)'; find $(STAGE) -type f -printf '%P\n' | while read -r f

install: stage ## install gvm, man pages and completion: PREFIX=/usr/local, DESTDIR=
	@$(EACH_FILE); do $$sudo install -D -m $$(stat -c %a $(STAGE)/$$f) $(STAGE)/$$f '$(DESTDIR)$(PREFIX)'/$$f || exit; done

uninstall: stage ## remove what install of the same tree has installed
	@$(EACH_FILE); do $$sudo rm -f '$(DESTDIR)$(PREFIX)'/$$f || exit; done
	@d='$(DESTDIR)$(PREFIX)/share/doc/gvm'; [ ! -d "$$d" ] || $(SUDO) rmdir --ignore-fail-on-non-empty "$$d"

# dpkg-deb, and not a tool such as nfpm: every Debian system has it, and the package is what install
# installs, with a dozen lines beside it.
MAINTAINER ?= $(shell git log -1 --format='%an <%ae>')
DEBFLAGS = -Zxz
deb: ZSHDIR = share/zsh/vendor-completions
deb: stage ## a Debian package, bin/gvm_VERSION_amd64.deb
	rm -rf $(BIN)/deb $(BIN)/gvm_*.deb
	install -d $(BIN)/deb/DEBIAN
	cp -R $(STAGE) $(BIN)/deb/usr
	cd $(BIN)/deb && find usr -type f | LC_ALL=C sort | xargs md5sum >DEBIAN/md5sums
	version=$$($(BIN)/gvm --version | sed 's/.* //; s/-/~/') && \
	size=$$(find $(BIN)/deb/usr -type f -printf '%s\n' | awk '{ n += int(($$1 + 1023) / 1024) } END { print n }') && \
	sed "s|@VERSION@|$$version|; s|@SIZE@|$$size|; s|@MAINTAINER@|$(MAINTAINER)|" packaging/control >$(BIN)/deb/DEBIAN/control && \
	chmod -R u=rwX,go=rX $(BIN)/deb && \
	dpkg-deb --root-owner-group $(DEBFLAGS) --build $(BIN)/deb $(BIN)/gvm_$${version}_amd64.deb

# These two use the toolchain of go.mod: a release has that one's standard library, whose known faults
# are mended. With OPTIONAL, and if it cannot be fetched, vulncheck uses the Go at hand.
OPTIONAL =
TOOLCHAIN = $(shell sed -n 's/^toolchain //p' go.mod)
FETCHED = $(shell GOTOOLCHAIN=$(TOOLCHAIN) $(GO) version >/dev/null 2>&1 && echo $(TOOLCHAIN) || echo local)
release: export GOTOOLCHAIN = $(TOOLCHAIN)
vulncheck: export GOTOOLCHAIN = $(if $(OPTIONAL),$(FETCHED),$(TOOLCHAIN))

release: ## programs, Debian package, their contents and checksums in bin/release, built twice: VERSION=1.2.3
	GO='$(GO)' packaging/release.sh '$(abspath $(BIN))/release' '$(VERSION)'

vulncheck: ## known vulnerabilities in the programs, by govulncheck: GOVULNDB=URL of the database
	$(GO) run ./packaging/vulncheck -tags $(TAGS) $(if $(OPTIONAL),-optional) ./cmd/gvm ./cmd/gvm-agent ./cmd/gvm-plot ./cmd/gvm-net

clean:
	rm -rf bin bench
