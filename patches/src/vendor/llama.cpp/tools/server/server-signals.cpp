// SIGINT and SIGTERM, see server-signals.h
//
// Relies on, of the server: server.cpp's signal_handler() may be called from any thread, and main() ends when it was called.

#include "server-signals.h"

#if defined(__unix__) || (defined(__APPLE__) && defined(__MACH__))

#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstdint>
#include <ctime>
#include <stdexcept>
#include <thread>

#include <unistd.h>

// a signal to the process group and the same one passed on by a parent are one
static constexpr int64_t T_SAME_MS = 300;

// how long it may take to end in order: longer than clients may take to read their last answers, see server-http.cpp,
// and shorter than service managers wait before they kill
static constexpr int64_t T_END_MS = 5000;

static int g_pipe[2];
static volatile int64_t g_t_first_ms = -1;

static int64_t server_signal_now_ms() {
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);

    return (int64_t) ts.tv_sec*1000 + ts.tv_nsec/1000000;
}

static void server_signal_forward(int signal) {
    const int64_t t_ms = server_signal_now_ms();

    if (g_t_first_ms >= 0) {
        if (t_ms - g_t_first_ms < T_SAME_MS) {
            return;
        }

        static const char msg[] = "Received second interrupt, terminating immediately.\n";
        const auto n = write(STDERR_FILENO, msg, sizeof(msg) - 1);
        (void) n;
        _exit(1);
    }

    g_t_first_ms = t_ms;

    const int err = errno;
    const unsigned char byte = signal;
    const auto n = write(g_pipe[1], &byte, 1);
    (void) n;
    errno = err;
}

static void server_signal_end() {
    std::this_thread::sleep_for(std::chrono::milliseconds(T_END_MS));

    static const char msg[] = "The server did not end in order in time, terminating immediately.\n";
    const auto n = write(STDERR_FILENO, msg, sizeof(msg) - 1);
    (void) n;
    _exit(0); // as asked, if not as hoped
}

struct server_signals::impl {
    std::thread thread;
};

server_signals::server_signals(const std::function<void(int)> & on_signal) : pimpl(new impl{}) {
    if (pipe(g_pipe) != 0) {
        delete pimpl;
        throw std::runtime_error("failed to create a pipe for signals");
    }

    pimpl->thread = std::thread([on_signal]() {
        unsigned char byte;
        ssize_t n;
        while ((n = read(g_pipe[0], &byte, 1)) > 0 || (n < 0 && errno == EINTR)) {
            if (n > 0) {
                // detached, for what is done after this object is gone may hang too
                std::thread(server_signal_end).detach();
                on_signal(byte);
            }
        }
    });

    struct sigaction action = {};
    action.sa_handler = server_signal_forward;
    action.sa_flags   = SA_RESTART; // whatever a thread waits for, the signal is not for it
    sigemptyset(&action.sa_mask);
    sigaction(SIGINT,  &action, nullptr);
    sigaction(SIGTERM, &action, nullptr);
}

server_signals::~server_signals() {
    std::signal(SIGINT,  SIG_DFL);
    std::signal(SIGTERM, SIG_DFL);

    close(g_pipe[1]);
    pimpl->thread.join();
    close(g_pipe[0]);

    delete pimpl;
}

#endif
