#pragma once

#include <functional>

// SIGINT and SIGTERM, handled by a thread of their own: what stops the server takes locks, and the thread that a signal
// interrupts may hold them. A second signal, 300 ms later or more, ends the process at once, and so does what has not
// ended 5 s after the first one.
// note: POSIX only, at most one at a time
struct server_signals {
    explicit server_signals(const std::function<void(int)> & on_signal);
    ~server_signals();

    server_signals(const server_signals &) = delete;
    server_signals & operator=(const server_signals &) = delete;

private:
    struct impl;
    impl * pimpl;
};
