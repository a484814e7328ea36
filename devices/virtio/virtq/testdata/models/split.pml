/*
 * The split virtqueue and the suppression of its notifications (virtio 1.3, 2.7), for spin: a driver,
 * and the device as virtq.Queue and virtio.Worker do it. README.md says how it is read and checked.
 */

#ifndef QSIZE
#define QSIZE 2 /* entries of the queue */
#endif
#ifndef MASK
#define MASK 3 /* indices wrap after it; 65535 in virtio */
#endif
#ifndef EVENT_IDX
#define EVENT_IDX 1 /* VIRTIO_F_EVENT_IDX */
#endif

#define VIRTQ_AVAIL_F_NO_INTERRUPT 1
#define VIRTQ_USED_F_NO_NOTIFY 1

#define idx(n) ((n) & MASK)
#ifndef LAST_EVENT_ONLY
#define need_event(event, new, old) (idx((new) - (event) - 1) < idx((new) - (old)))
#else
#define need_event(event, new, old) (idx((new) - 1) == (event))
#endif

/* Memory that both sides see: what the driver writes, and what the device writes. */
#define AVAIL_FLAGS 0
#define AVAIL_IDX 1
#define USED_EVENT 2
#define AVAIL_RING 3
#define USED_FLAGS (AVAIL_RING + QSIZE)
#define USED_IDX (USED_FLAGS + 1)
#define AVAIL_EVENT (USED_FLAGS + 2)
#define USED_RING (USED_FLAGS + 3)
byte mem[USED_RING + QSIZE];

/*
 * A store waits in the processor's buffer, and others see it when it leaves the buffer, in order: x86's.
 * A full fence waits until the buffer is empty. One place is enough, as no side loads between two
 * stores that are not fenced. Entries of the rings go to memory at once: they leave the buffer before
 * the idx that leads to them.
 */
chan driver_stores = [1] of { byte, byte };
chan device_stores = [1] of { byte, byte };

inline drain(stores) {
	byte at, value;
end:	do
	:: d_step { stores ? at, value -> mem[at] = value; at = 0; value = 0 }
	od
}
active proctype driver_processor() { drain(driver_stores) }
active proctype device_processor() { drain(device_stores) }

#ifdef NO_NOTIFY_FENCE
#define notify_fence skip
#else
#define notify_fence empty(driver_stores)
#endif
#ifdef NO_USED_EVENT_FENCE
#define used_event_fence skip
#else
#define used_event_fence empty(driver_stores)
#endif
#ifdef NO_INTERRUPT_FENCE
#define interrupt_fence skip
#else
#define interrupt_fence empty(device_stores)
#endif
#ifdef NO_AVAIL_EVENT_FENCE
#define avail_event_fence skip
#else
#define avail_event_fence empty(device_stores)
#endif

/*
 * The two eventfds. The decision to signal one and the signal are a single step: a signal that comes
 * later is not lost for that.
 */
bit kick, call;

/* Whose each buffer is; a check, which neither side reads. */
#define FREE 0
#define AVAILABLE 1
#define TAKEN 2
#define USED 3
byte buffer[QSIZE];

/* find makes id any buffer of the kind. */
inline find(kind) {
	if
	:: buffer[0] == kind -> id = 0
#if QSIZE > 1
	:: buffer[1] == kind -> id = 1
#endif
#if QSIZE > 2
	:: buffer[2] == kind -> id = 2
	:: buffer[3] == kind -> id = 3
#endif
	fi
}

/* The driver always has more to send, as much as the queue holds. */
active proctype driver() {
	byte next, published, last_used, outstanding, id;
	bit reaped;
	do
	:: outstanding < QSIZE ->
		/* 2.7.13: entries of the ring, then idx, then the look at the device's wish. */
#ifdef IDX_BEFORE_ENTRY
		driver_stores ! AVAIL_IDX, idx(next + 1);
#endif
		do
		:: atomic {
			outstanding < QSIZE ->
			find(FREE);
			buffer[id] = AVAILABLE;
			mem[AVAIL_RING + next % QSIZE] = id;
			next = idx(next + 1);
			outstanding++;
			id = 0
		   }
#ifdef IDX_BEFORE_ENTRY
		   ; break
#endif
		:: next != published -> break
		od;
		driver_stores ! AVAIL_IDX, next;
		notify_fence;
#if EVENT_IDX
		d_step {
			kick = kick || need_event(mem[AVAIL_EVENT], next, published);
			published = next
		}
#else
		d_step {
			kick = kick || !(mem[USED_FLAGS] & VIRTQ_USED_F_NO_NOTIFY);
			published = next
		}
#endif
	:: outstanding > 0 ->
		/* 2.7.14: ask for the interrupt, then look again, then wait for it. */
#if EVENT_IDX
		driver_stores ! USED_EVENT, last_used;
#else
		driver_stores ! AVAIL_FLAGS, 0;
#endif
		used_event_fence;
		if
#ifndef NO_LOOK_OF_DRIVER
		:: mem[USED_IDX] != last_used
		:: mem[USED_IDX] == last_used -> atomic { call -> call = 0 }
#else
		:: atomic { call -> call = 0 }
#endif
		fi;
		if /* a driver may turn interrupts off while it works */
		:: true
		:: true ->
#if EVENT_IDX
			driver_stores ! USED_EVENT, idx(last_used - 1)
#else
			driver_stores ! AVAIL_FLAGS, VIRTQ_AVAIL_F_NO_INTERRUPT
#endif
		fi;
		do
		:: mem[USED_IDX] != last_used ->
progress:		atomic {
				id = mem[USED_RING + last_used % QSIZE];
				assert(buffer[id] == USED);
				buffer[id] = FREE;
				last_used = idx(last_used + 1);
				outstanding--;
				id = 0;
				reaped = 1
			}
		:: mem[USED_IDX] == last_used -> break
		:: reaped -> break /* the rest later */
		od;
		reaped = 0
	od
}

/* complete gives back some buffers, in any order, and sets signal if the driver asks for an interrupt. */
inline complete(signal) {
	do
	:: atomic {
		in_flight > 0 ->
		find(TAKEN);
		buffer[id] = USED;
		mem[USED_RING + used % QSIZE] = id;
		used = idx(used + 1);
		in_flight--;
		id = 0
	   }
	:: used != published -> break
	od;
	device_stores ! USED_IDX, used;
	interrupt_fence;
#if EVENT_IDX
	d_step {
		signal = signal || need_event(mem[USED_EVENT], used, published);
		published = used
	}
#else
	d_step {
		signal = signal || !(mem[AVAIL_FLAGS] & VIRTQ_AVAIL_F_NO_INTERRUPT);
		published = used
	}
#endif
}

/* With VIRTIO_F_EVENT_IDX avail_event just stays behind. */
inline disable_kicks() {
#if EVENT_IDX
	skip
#else
	device_stores ! USED_FLAGS, VIRTQ_USED_F_NO_NOTIFY
#endif
}

active proctype device() {
	byte next, available, used, published, in_flight, id;
	bit owed;
	do
	:: disable_kicks();
		do
		:: atomic {
			available == next && mem[AVAIL_IDX] != next ->
			available = mem[AVAIL_IDX];
			assert(idx(available - next) + in_flight <= QSIZE)
		   }
		:: atomic {
			available != next ->
			id = mem[AVAIL_RING + next % QSIZE];
			assert(buffer[id] == AVAILABLE);
			buffer[id] = TAKEN;
			next = idx(next + 1);
			in_flight++;
			id = 0
		   }
		:: in_flight > 0 -> complete(owed)
		:: atomic { owed -> owed = 0; call = 1 }
		:: available == next && mem[AVAIL_IDX] == next ->
			if
			:: atomic { owed -> owed = 0; call = 1 }
			:: else
			fi;
#if EVENT_IDX
			device_stores ! AVAIL_EVENT, next;
#else
			device_stores ! USED_FLAGS, 0;
#endif
			avail_event_fence;
			if
#ifndef NO_LOOK_OF_DEVICE
			:: mem[AVAIL_IDX] != next -> disable_kicks()
			:: mem[AVAIL_IDX] == next -> break
#else
			:: break
#endif
			fi
		od;
		do /* waits; another thread may complete meanwhile */
		:: atomic { kick -> kick = 0; break }
		:: in_flight > 0 -> complete(call)
		od
	od
}
