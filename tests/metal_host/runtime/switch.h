// Saves the callee's registers on this stack and goes on where `to` left off.
#pragma once
#if defined(__x86_64__)
extern "C" void host_switch(void** save, void* to);
asm(R"(
.text
.globl host_switch
.type host_switch,@function
host_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size host_switch,.-host_switch
)");
#endif
