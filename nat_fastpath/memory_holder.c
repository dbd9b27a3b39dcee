/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include "memory_holder.h"

#include <errno.h>
#include <limits.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096u
#define STACK_BYTES (4u * PAGE)
#define READY_NS 100000 /* between two looks whether the holder is ready */
#define READY_LOOKS 20000u

enum state { STARTING, READY, REFUSED };

struct shared {
    pid_t parent;
    _Atomic int state;
};

static void wake(int number)
{
    (void)number;
}

/* Runs in the memory of its parent, on a stack of its own, but with the parent's thread-local storage: so
 * only bare system calls, none of which fails (errno would be the parent's), and nothing of Python. */
static int hold(void *argument)
{
    struct shared *shared = argument;
    const int died = SIGRTMAX;                            /* a signal that nobody else sends */
    const uint64_t others = ~(UINT64_C(1) << (died - 1)); /* a set of signals, as the kernel has them */

    sigaction(died, &(struct sigaction){.sa_handler = wake}, NULL);
    prctl(PR_SET_NAME, "nat-memory", 0, 0, 0);
    prctl(PR_SET_PDEATHSIG, died, 0, 0, 0);
    /* Copies of the parent's descriptors would keep its connections open, which is the very thing to avoid.
     */
    const long closed = syscall(SYS_close_range, 0u, UINT_MAX, 0u);
    if (closed || getppid() != shared->parent) { /* the parent may have died before PDEATHSIG was set */
        atomic_store(&shared->state, REFUSED);
        return 1;
    }
    atomic_store(&shared->state, READY);
    /* The signal comes for each thread of the parent that ends. Its files close with the last one, which may
     * be some ms behind the others, and it must find us alive: it would take the memory apart before. */
    do
        syscall(SYS_rt_sigsuspend, &others, sizeof others);
    while (getppid() == shared->parent);
    return 0;
}

int memory_holder_start(struct memory_holder *holder)
{
    char *stack = mmap(NULL, STACK_BYTES + PAGE, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_STACK, -1, 0);
    if (stack == MAP_FAILED)
        return errno;
    mprotect(stack, PAGE, PROT_NONE);
    /* At the top of the stack, which outlives this call. */
    struct shared *shared = (struct shared *)(stack + PAGE + STACK_BYTES - 64);
    shared->parent = getpid();
    atomic_store(&shared->state, STARTING);

    sigset_t all, before;
    sigfillset(&all);
    /* Its handlers would be ours, on memory that is ours too. */
    pthread_sigmask(SIG_SETMASK, &all, &before);
    /* No exit signal: such a child is invisible to waitpid and SIGCHLD handlers that do not ask for it
     * (__WCLONE), so whoever waits for "any child" never meets it. */
    const pid_t pid = clone(hold, shared, CLONE_VM, shared);
    const int error = errno;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (pid < 0) {
        munmap(stack, STACK_BYTES + PAGE);
        return error;
    }
    *holder = (struct memory_holder){.pid = pid, .stack = stack};
    for (unsigned i = 0; atomic_load(&shared->state) == STARTING && i < READY_LOOKS; i++)
        nanosleep(&(struct timespec){.tv_nsec = READY_NS}, NULL);
    if (atomic_load(&shared->state) != READY) {
        memory_holder_stop(holder);
        return ENOSYS;
    }
    return 0;
}

bool memory_holder_alive(const struct memory_holder *holder)
{
    siginfo_t info = {0};
    return !waitid(P_PID, (id_t)holder->pid, &info, WEXITED | WNOHANG | WNOWAIT | __WCLONE) && !info.si_pid;
}

void memory_holder_stop(struct memory_holder *holder)
{
    kill(holder->pid, SIGKILL);
    while (waitpid(holder->pid, NULL, __WCLONE) < 0 && errno == EINTR)
        ;
    munmap(holder->stack, STACK_BYTES + PAGE); /* only now: it stood on it */
    *holder = (struct memory_holder){0};
}
