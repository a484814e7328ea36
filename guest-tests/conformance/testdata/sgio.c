/*
 * Preloaded into a program, this makes /dev/sg0 a connection to the socket named
 * by SGIO_SOCKET, /dev/sg1 one to the socket of that name with 1 appended, and so
 * on. SG_IO on them is a message each way:
 *
 *	to the socket:   4 numbers of 32 bits, the lengths of the CDB, of data-out
 *	                 and of data-in, and 0; the CDB; the data-out
 *	from the socket: status, length of sense data, residual, and 0; the sense
 *	                 data; all of the data-in buffer
 *
 * SG_SCSI_RESET is a message without CDB and data, whose last number selects the
 * reset.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/un.h>
#include <unistd.h>
#include <scsi/sg.h>

static int connections[64], count;

static void fail(const char *what)
{
	perror(what);
	exit(9);
}

static void move(int fd, void *at, size_t left, int out)
{
	while (left > 0) {
		ssize_t n = out ? write(fd, at, left) : read(fd, at, left);

		if (n <= 0)
			fail("sgio: socket");
		at = (char *)at + n;
		left -= n;
	}
}

/* The N of /dev/sgN, or -1. */
static int sg_number(const char *path)
{
	return !strncmp(path, "/dev/sg", 7) && path[7] >= '0' && path[7] <= '9' && !path[8] ? path[7] - '0' : -1;
}

static int connect_sg(int number)
{
	struct sockaddr_un to = {.sun_family = AF_UNIX};
	const char *path = getenv("SGIO_SOCKET");
	int fd = socket(AF_UNIX, SOCK_STREAM, 0);

	if (!path || strlen(path) >= sizeof(to.sun_path) - 1 || fd < 0 || count == 64)
		fail("sgio: SGIO_SOCKET");
	strcpy(to.sun_path, path);
	if (number)
		strncat(to.sun_path, &"0123456789"[number], 1);
	if (connect(fd, (struct sockaddr *)&to, sizeof(to)))
		fail(to.sun_path);
	return connections[count++] = fd;
}

#define OPEN(name) \
int name(const char *path, int flags, ...) \
{ \
	static int (*real)(const char *, int, ...); \
	va_list rest; \
	int mode; \
\
	va_start(rest, flags); \
	mode = va_arg(rest, int); \
	va_end(rest); \
	if (sg_number(path) >= 0) \
		return connect_sg(sg_number(path)); \
	if (!real) \
		real = dlsym(RTLD_NEXT, #name); \
	return real(path, flags, mode); \
}
OPEN(open)
OPEN(open64)
OPEN(__open64_2) /* open64, with _FORTIFY_SOURCE */

/* /dev/sgN is a character device. */
#define STAT(name, type) \
int name(const char *path, struct type *st) \
{ \
	static int (*real)(const char *, struct type *); \
\
	if (sg_number(path) >= 0) { \
		memset(st, 0, sizeof(*st)); \
		st->st_mode = S_IFCHR | 0600; \
		st->st_rdev = makedev(21, sg_number(path)); \
		return 0; \
	} \
	if (!real) \
		real = dlsym(RTLD_NEXT, #name); \
	return real(path, st); \
}
STAT(stat, stat)
STAT(stat64, stat64)

int fstat64(int fd, struct stat64 *st)
{
	static int (*real)(int, struct stat64 *);

	for (int i = 0; i < count; i++)
		if (connections[i] == fd)
			return stat64("/dev/sg0", st);
	if (!real)
		real = dlsym(RTLD_NEXT, "fstat64");
	return real(fd, st);
}

static int sg_io(int fd, sg_io_hdr_t *h)
{
	int out = h->dxfer_direction == SG_DXFER_TO_DEV, in = h->dxfer_direction == SG_DXFER_FROM_DEV;
	uint32_t ask[4] = {h->cmd_len, out ? h->dxfer_len : 0, in ? h->dxfer_len : 0}, answer[4];
	sg_iovec_t whole = {h->dxferp, h->dxfer_len}, *iov = h->iovec_count ? h->dxferp : &whole;
	int n = h->iovec_count ? h->iovec_count : 1;
	unsigned char sense[256];

	move(fd, ask, sizeof(ask), 1);
	move(fd, h->cmdp, h->cmd_len, 1);
	for (int i = 0; out && i < n; i++)
		move(fd, iov[i].iov_base, iov[i].iov_len, 1);
	move(fd, answer, sizeof(answer), 0);
	move(fd, sense, answer[1], 0);
	for (int i = 0; in && i < n; i++)
		move(fd, iov[i].iov_base, iov[i].iov_len, 0);
	h->status = answer[0];
	h->resid = answer[2];
	h->host_status = 0;
	h->driver_status = answer[1] ? 8 : 0; /* DRIVER_SENSE */
	h->sb_len_wr = answer[1] < h->mx_sb_len ? answer[1] : h->mx_sb_len;
	if (h->sbp)
		memcpy(h->sbp, sense, h->sb_len_wr);
	return 0;
}

static int reset(int fd, uint32_t what)
{
	uint32_t ask[4] = {0, 0, 0, what}, answer[4];

	move(fd, ask, sizeof(ask), 1);
	move(fd, answer, sizeof(answer), 0);
	errno = EIO;
	return answer[0] ? -1 : 0;
}

int ioctl(int fd, unsigned long request, ...)
{
	static int (*real)(int, unsigned long, ...);
	va_list rest;
	void *arg;

	va_start(rest, request);
	arg = va_arg(rest, void *);
	va_end(rest);
	for (int i = 0; i < count; i++) {
		if (connections[i] != fd)
			continue;
		switch (request) {
		case SG_GET_VERSION_NUM:
			*(int *)arg = 30536;
			return 0;
		case SG_IO:
			return sg_io(fd, arg);
		case SG_SCSI_RESET:
			return reset(fd, *(int *)arg);
		case SG_SET_TIMEOUT:
		case SG_SET_RESERVED_SIZE:
			return 0;
		}
		errno = EINVAL;
		return -1;
	}
	if (!real)
		real = dlsym(RTLD_NEXT, "ioctl");
	return real(fd, request, arg);
}
