#pragma once

#include "common.h"

#include <string>
#include <vector>

// Whom the server answers.
//
// Every web page that a user visits can send requests to the servers of his own machine and of his network. The browser
// says which page it was: its origin in the Origin header, and in the Host header the name under which it looked us up,
// which is a foreign one where a page gave its own name our address (DNS rebinding). Programs that are no browser send
// no Origin.

struct server_guard {
    // hostname - what the listener is bound to: an address, a name, or the path of a UNIX socket, which no page can reach
    server_guard(const common_params & params, const std::string & hostname);

    // why a request with these headers is refused, empty: it is not. Both are empty where the header is missing
    std::string refusal(const std::string & host, const std::string & origin) const;

    // the value of Access-Control-Allow-Origin, empty: no such header
    std::string allow_origin(const std::string & origin) const;

private:
    bool is_own_host   (const std::string & host) const;
    bool is_listed     (const std::string & origin) const;

    bool is_any_host;
    bool is_any_origin;
    bool is_local_origin; // pages of this machine may use it
    bool is_credentials;

    std::vector<std::string> hosts;   // in lower case, names that begin with a dot stand for all below them
    std::vector<std::string> origins; // in lower case, scheme://* stands for all of a scheme
};

// the API key of a request: of "Authorization: Bearer KEY", in any case, else as it is
std::string server_guard_api_key(const std::string & authorization);
