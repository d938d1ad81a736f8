// What a process says when a signal ends it. Only what POSIX allows in a signal handler is called in one.
// The reason of an abort comes from ggml, whose ggml_set_abort_callback() is given llama_cpp_sentinel_abort().

#include "sentinel.h"

#if !defined(_WIN32)

#define _XOPEN_SOURCE 700

#include <signal.h>
#include <stdatomic.h>
#include <stddef.h>
#include <string.h>
#include <unistd.h>

#define N_SIGNALS    65
#define ALT_STACK    65536 // bytes; a frame with the registers of AVX-512 and AMX takes some 11 KiB of it
#define ABORT_REASON 2048

static struct {
    const char *     before;
    const char *     step;
    const char *     after;
    struct sigaction previous;
} words[N_SIGNALS];

static int         end_fd = -1;
static char        abort_reason[ABORT_REASON];
static atomic_flag told = ATOMIC_FLAG_INIT;

static void say(const char * text) {
    size_t size = strlen(text);
    while (size > 0) {
        const ssize_t n = write(STDERR_FILENO, text, size);
        if (n <= 0) {
            return;
        }
        text += n;
        size -= (size_t) n;
    }
}

static void handle(int signum) {
    if (!atomic_flag_test_and_set(&told)) {
        if (words[signum].before) {
            say(words[signum].before);
            say(words[signum].step);
            say(abort_reason);
            say(words[signum].after);
        }
        if (end_fd >= 0 && write(end_fd, "", 1) < 0) {
            // nobody listens
        }
    } else {
        sleep(1); // another thread is telling
    }
    // delivered when this returns, where the fault itself does not come again
    sigaction(signum, &words[signum].previous, NULL);
    raise(signum);
}

// A stack that overflows leaves no room for the handler.
static void use_other_stack(void) {
    static char stack[ALT_STACK];
    stack_t     current;
    if (sigaltstack(NULL, &current) == 0 && (current.ss_flags & SS_DISABLE)) {
        const stack_t other = { .ss_sp = stack, .ss_size = sizeof(stack), .ss_flags = 0 };
        sigaltstack(&other, NULL);
    }
}

int llama_cpp_sentinel_last_words(int signum, const char * before, const char * step, const char * after) {
    struct sigaction action;
    if (signum <= 0 || signum >= N_SIGNALS || sigaction(signum, NULL, &words[signum].previous) != 0) {
        return -1;
    }
    if (words[signum].previous.sa_handler == SIG_IGN || (!before && words[signum].previous.sa_handler != SIG_DFL)) {
        return -1;
    }
    use_other_stack();
    words[signum].before = before;
    words[signum].step   = step;
    words[signum].after  = after;
    memset(&action, 0, sizeof(action));
    action.sa_handler = handle;
    action.sa_flags   = SA_ONSTACK;
    sigemptyset(&action.sa_mask);
    return sigaction(signum, &action, NULL);
}

void llama_cpp_sentinel_last_words_fd(int fd) {
    end_fd = fd;
}

// "/tmp/build/ggml/src/ggml.c:12: GGML_ASSERT(n > 0) failed" -> ": ggml.c:12: GGML_ASSERT(n > 0) failed"
void llama_cpp_sentinel_abort(const char * reason) {
    const char * name = reason;
    for (const char * at = reason; *at && *at != ':'; at++) {
        if (*at == '/') {
            name = at + 1;
        }
    }
    abort_reason[0] = ':';
    abort_reason[1] = ' ';
    strncpy(abort_reason + 2, name, sizeof(abort_reason) - 3);
    for (char * at = abort_reason; *at; at++) {
        if ((unsigned char) *at < 0x20 || *at == 0x7f) {
            *at = ' '; // a name in it may come from a file
        }
    }
}

#endif
