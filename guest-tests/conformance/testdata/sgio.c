/*
 * Preloaded into a program, this makes /dev/sg0 a connection to the socket that
 * SGIO_SOCKET names, and SG_IO on it a message each way:
 *
 *	to the socket:   4 numbers of 32 bits, the lengths of the CDB, of data-out
 *	                 and of data-in, and 0; the CDB; the data-out
 *	from the socket: status, length of sense data, residual, and 0; the sense
 *	                 data; all of the data-in buffer
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

static int connect_sg(void)
{
	struct sockaddr_un to = {.sun_family = AF_UNIX};
	const char *path = getenv("SGIO_SOCKET");
	int fd = socket(AF_UNIX, SOCK_STREAM, 0);

	if (!path || strlen(path) >= sizeof(to.sun_path) || fd < 0 || count == 64)
		fail("sgio: SGIO_SOCKET");
	strcpy(to.sun_path, path);
	if (connect(fd, (struct sockaddr *)&to, sizeof(to)))
		fail(path);
	return connections[count++] = fd;
}

int open(const char *path, int flags, ...)
{
	static int (*real)(const char *, int, ...);
	va_list rest;
	int mode;

	va_start(rest, flags);
	mode = va_arg(rest, int);
	va_end(rest);
	if (!strcmp(path, "/dev/sg0"))
		return connect_sg();
	if (!real)
		real = dlsym(RTLD_NEXT, "open");
	return real(path, flags, mode);
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
		}
		errno = EINVAL;
		return -1;
	}
	if (!real)
		real = dlsym(RTLD_NEXT, "ioctl");
	return real(fd, request, arg);
}
