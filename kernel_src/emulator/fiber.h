// SPDX-License-Identifier: Apache-2.0
// Fibers: stacks, the switch between them, and how code on a fiber finds the emulated thread it
// belongs to.
#pragma once
#include <stddef.h>
#include <stdint.h>
#include <sys/mman.h>
#include <unistd.h>

#include <new>

#if !defined(__x86_64__) || defined(FMHA_EMULATOR_UCONTEXT)
#define FMHA_EMULATOR_USES_UCONTEXT 1
#include <ucontext.h>
#endif

namespace fmha {
namespace emu {

struct Thread;

// A suspended flow of control.
#ifdef FMHA_EMULATOR_USES_UCONTEXT
struct Context {
    ucontext_t state;
};

inline void switch_context(Context& from, Context& to) { swapcontext(&from.state, &to.state); }

inline void prepare_context(Context& context, char* stack, size_t bytes, void (*entry)()) {
    getcontext(&context.state);
    context.state.uc_stack.ss_sp = stack;
    context.state.uc_stack.ss_size = bytes;
    context.state.uc_link = nullptr;
    makecontext(&context.state, entry, 0);
}
#else
struct Context {
    void* stack_pointer;
};

// Saves what the System V ABI says a call preserves, and continues where `to` was saved: a few
// nanoseconds, where swapcontext makes two system calls. The floating-point control words are the
// same in every fiber.
asm(R"(
.pushsection .text
.local fmha_emulator_switch
.type fmha_emulator_switch, @function
fmha_emulator_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq (%rsi), %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size fmha_emulator_switch, . - fmha_emulator_switch
.popsection
)");
extern "C" __attribute__((visibility("hidden"))) void fmha_emulator_switch(void** save, void** load);

inline void switch_context(Context& from, Context& to) { fmha_emulator_switch(&from.stack_pointer, &to.stack_pointer); }

// The first switch pops six registers and "returns" into entry, which must find the stack as after
// a call.
inline void prepare_context(Context& context, char* stack, size_t bytes, void (*entry)()) {
    void** top = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(stack + bytes) & ~uintptr_t{63});
    top -= 8;
    for (int i = 0; i < 8; ++i) top[i] = nullptr;
    top[6] = reinterpret_cast<void*>(entry);
    context.stack_pointer = top;
}
#endif

// Stacks of one size, aligned to that size, so that the address of any local variable leads to the
// stack's owner.
class Stacks {
  public:
    static constexpr size_t kBytes = 256 << 10;

    explicit Stacks(int count) : count_(count) {
        mapping_ = mmap(nullptr, kBytes * (count + 1), PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (mapping_ == MAP_FAILED) throw std::bad_alloc();
        first_ = (reinterpret_cast<uintptr_t>(mapping_) + kBytes - 1) & ~(kBytes - 1);
        for (int i = 0; i < count; ++i)  // an overflow hits an unmapped page, not the neighbour
            mprotect(reinterpret_cast<void*>(first_ + kBytes * i), sysconf(_SC_PAGESIZE), PROT_NONE);
    }
    ~Stacks() { munmap(mapping_, kBytes * (count_ + 1)); }
    Stacks(const Stacks&) = delete;
    Stacks& operator=(const Stacks&) = delete;

    void give(int index, Thread* owner, Context& context, void (*entry)()) const {
        const uintptr_t base = first_ + kBytes * index;
        Thread** slot = owner_slot(base);
        *slot = owner;
        prepare_context(context, reinterpret_cast<char*>(base), reinterpret_cast<uintptr_t>(slot) - base, entry);
    }

    // The thread on whose stack the caller runs.
    static Thread* owner() {
        return *owner_slot(reinterpret_cast<uintptr_t>(__builtin_frame_address(0)) & ~(kBytes - 1));
    }

  private:
    // Just above the stack's top. The top moves with the index: equal offsets would make the hot
    // ends of all stacks compete for the same few cache sets.
    static Thread** owner_slot(uintptr_t base) {
        const size_t color = base / kBytes % 32 * 2112;
        return reinterpret_cast<Thread**>(base + kBytes - 64 - color);
    }

    int count_;
    void* mapping_;
    uintptr_t first_;
};

}  // namespace emu
}  // namespace fmha
