# Entry from the loader, the switch to long mode, interrupt entry, and the code application processors start in.

#define XEN_ELFNOTE_PHYS32_ENTRY 18

	.section .note.pvh, "a", @note
	.balign 4
	.long 4				# name size
	.long 8				# descriptor size: QEMU reads eight bytes of it in an ELF64 file
	.long XEN_ELFNOTE_PHYS32_ENTRY
	.asciz "Xen"
	.quad pvh_start

# PVH start (Xen docs/misc/pvh.pandoc): 32-bit protected mode, flat segments, paging off, ebx = address of hvm_start_info.
# The loader has cleared .bss, as for every ELF segment.
	.section .text.boot, "ax"
	.code32
	.globl pvh_start
pvh_start:
	cli
	cld
	movl $boot_stack_end, %esp

	# Identity map of the first 16 MiB in 2 MiB pages. map() in paging.c adds what else the guest touches.
	# Ring 3 may use all of it: see bench.c.
	movl $(page_directory_pointers + 7), page_map
	movl $(page_directory + 7), page_directory_pointers
	movl $page_directory, %edi
	movl $0x87, %eax		# present, writable, user, large
1:	movl %eax, (%edi)
	addl $8, %edi
	addl $0x200000, %eax
	cmpl $(0x87 + 16 * 1024 * 1024), %eax
	jb 1b

	movl $0x20, %eax		# CR4.PAE
	movl %eax, %cr4
	movl $page_map, %eax
	movl %eax, %cr3
	movl $0xc0000080, %ecx		# EFER
	rdmsr
	orl $0x100, %eax		# LME
	wrmsr
	movl $0x80000031, %eax		# PG, NE, ET, PE
	movl %eax, %cr0
	lgdt gdt_pointer
	ljmp $8, $long_start

	.code64
long_start:
	movl $16, %eax
	movl %eax, %ds
	movl %eax, %es
	movl %eax, %ss
	xorl %eax, %eax
	movl %eax, %fs
	movl %eax, %gs
	movl %ebx, %edi			# zero-extends: guest_main(hvm_start_info *)
	call guest_main
1:	cli
	hlt
	jmp 1b

# One entry per vector, 16 bytes apart. Each leaves the vector and an error code (0 where the processor pushes none) on the stack.
	.text
	.globl vector_entries
	.balign 16
vector_entries:
	.set vector, 0
	.rept 64
	.balign 16
	.if vector != 8 && (vector < 10 || vector > 14) && vector != 17 && vector != 21
	pushq $0
	.endif
	pushq $vector
	jmp interrupt_common
	.set vector, vector + 1
	.endr

	.balign 16
interrupt_common:
	pushq %rax
	pushq %rcx
	pushq %rdx
	pushq %rsi
	pushq %rdi
	pushq %r8
	pushq %r9
	pushq %r10
	pushq %r11
	cld
	movq %rsp, %rdi			# struct interrupt_frame; the stack is 16-byte aligned here
	call interrupt_handler
	popq %r11
	popq %r10
	popq %r9
	popq %r8
	popq %rdi
	popq %rsi
	popq %rdx
	popq %rcx
	popq %rax
	addq $16, %rsp
	iretq

# run_in_ring3(f): calls f, which does not return, in ring 3, where it may do port I/O: by the permission bitmap, as not every KVM
# keeps an IOPL of 3. Interrupts come back to ring 0 on the stack that this leaves.
	.globl run_in_ring3
run_in_ring3:
	movl $(task_state_segment), %eax
	movq %rsp, 4(%rax)		# RSP0
	movw $104, 102(%rax)		# where the I/O permission bitmap is, whose zeroes permit
	movb $0xff, 104 + 8192(%rax)	# and its end
	movw %ax, gdt_task + 2
	shrl $16, %eax
	movb %al, gdt_task + 4
	movb %ah, gdt_task + 7
	movl $40, %eax
	ltr %ax
	movl $27, %eax			# data, ring 3
	movl %eax, %ds
	movl %eax, %es
	pushq $27
	pushq $ring3_stack_end
	pushq $0x202			# interrupts on
	pushq $35			# code, ring 3
	pushq %rdi
	iretq

# Application processors start here, in real mode at the page the start-up IPI names (smp.c copies this code there): count, sleep.
	.section .rodata
	.globl ap_start, ap_counter, ap_end
	.code16
ap_start:
	cli
	lock incl %cs:(ap_counter - ap_start)
1:	hlt
	jmp 1b
	.balign 4
ap_counter:
	.long 0
ap_end:

	.data
	.balign 8
gdt:
	.quad 0
	.quad 0x00af9a000000ffff	# 8: 64-bit code
	.quad 0x00cf92000000ffff	# 16: data
	.quad 0x00cff2000000ffff	# 24: data, ring 3
	.quad 0x00affa000000ffff	# 32: 64-bit code, ring 3
gdt_task:
	.quad 0x0000890000002068	# 40: task state segment, whose address run_in_ring3 puts in
	.quad 0
gdt_end:
gdt_pointer:
	.word gdt_end - gdt - 1
	.long gdt
	.long 0

	.bss
	.globl page_map
	.balign 4096
page_map:
	.skip 4096
page_directory_pointers:
	.skip 4096
page_directory:
	.skip 4096
	.balign 16
	.skip 16384
boot_stack_end:
	.skip 16384 - 8
ring3_stack_end:			# as after a call
	.skip 8
task_state_segment:
	.skip 104 + 8192 + 1
