# The first program of a Linux guest whose boot is measured: it says that it runs, to whoever can hear
# that, and waits. Without a library, so that it runs a few instructions after the kernel has started it.
# The kernel does its port I/O, by what /dev/port is (without CONFIG_DEVPORT there is none): a program's
# own needs iopl(3), after which OUT has faulted in a guest of a software-emulated processor.

	.set	SYS_write, 1
	.set	SYS_open, 2
	.set	SYS_pwrite64, 18
	.set	SYS_pause, 34
	.set	SYS_mknod, 133

	.globl	_start
	.text
_start:
	mov	$SYS_mknod, %eax	# mknod("/port", S_IFCHR | 0600, makedev(1, 4))
	lea	port(%rip), %rdi
	mov	$020600, %esi
	mov	$0x104, %edx
	syscall
	mov	$SYS_open, %eax		# ebx = open("/port", O_WRONLY)
	lea	port(%rip), %rdi
	mov	$1, %esi
	syscall
	mov	%eax, %ebx

	lea	stamp(%rip), %rsi	# port 0x80: gvm run --timing prints when
	mov	$0x80, %r10d
	call	out
	lea	line(%rip), %rsi	# port 0x402: QEMU's isa-debugcon
1:	mov	$0x402, %r10d
	call	out
	inc	%rsi
	cmpb	$'\n', -1(%rsi)
	jne	1b

	mov	$SYS_write, %eax	# the console: write(1, line, length)
	mov	$1, %edi
	lea	line(%rip), %rsi
	mov	$length, %edx
	syscall
wait:	mov	$SYS_pause, %eax
	syscall
	jmp	wait

# out writes the byte at rsi to the port r10.
out:	mov	$SYS_pwrite64, %eax
	mov	%ebx, %edi
	mov	$1, %edx
	syscall
	ret

port:	.asciz	"/port"
stamp:	.byte	0x41
line:	.ascii	"init runs\n"
	.set	length, . - line
