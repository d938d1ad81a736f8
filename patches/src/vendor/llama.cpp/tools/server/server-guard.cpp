// Whom the server answers, see server-guard.h
//
// Relies on, of the server: server-http.cpp asks for each request before it is routed; common_params has --cors-origins and
// --cors-credentials of upstream's and --allowed-hosts of the same patch.

#include "server-guard.h"

#include <algorithm>
#include <cctype>

#ifdef _WIN32
#include <winsock2.h>
#else
#include <unistd.h>
#endif

static std::string to_lower(std::string text) {
    std::transform(text.begin(), text.end(), text.begin(), [](unsigned char c) { return std::tolower(c); });

    return text;
}

static std::vector<std::string> split_list(const std::string & list) {
    std::vector<std::string> res;
    for (const auto & item : string_split(list, ",")) {
        const std::string word = to_lower(string_strip(item));
        if (!word.empty()) {
            res.push_back(word);
        }
    }

    return res;
}

// name or address of "host:port", without the brackets of an IPv6 address and the dot that ends a full name
static std::string host_of(const std::string & authority) {
    if (!authority.empty() && authority.front() == '[') {
        const size_t end = authority.find(']');
        return end == std::string::npos ? authority : authority.substr(1, end - 1);
    }

    std::string host = authority.substr(0, authority.find(':'));
    if (!host.empty() && host.back() == '.') {
        host.pop_back();
    }

    return host;
}

// a page cannot give an address to another one, so what is asked under an address is asked by our own page or by no page
static bool is_address(const std::string & authority) {
    if (!authority.empty() && authority.front() == '[') {
        return authority.find(']') != std::string::npos;
    }

    const std::string host = host_of(authority);

    return !host.empty() && host.find_first_not_of("0123456789.") == std::string::npos;
}

static bool is_loopback(const std::string & authority) {
    const std::string host = host_of(authority);

    return host == "localhost" || string_ends_with(host, ".localhost") ||
        (is_address(authority) && (host == "::1" || string_starts_with(host, "127.")));
}

// "scheme://host:port" without a port that the scheme implies
static std::string without_default_port(const std::string & scheme, const std::string & authority) {
    const std::string port = scheme == "http" ? ":80" : scheme == "https" ? ":443" : "";
    if (!port.empty() && string_ends_with(authority, port)) {
        return authority.substr(0, authority.size() - port.size());
    }

    return authority;
}

struct origin_parts {
    std::string scheme;
    std::string authority;
};

// both empty for "null", which stands for files, sandboxes and redirections
static origin_parts parse_origin(const std::string & origin) {
    const size_t pos = origin.find("://");
    if (pos == std::string::npos) {
        return {};
    }

    return { origin.substr(0, pos), origin.substr(pos + 3) };
}

server_guard::server_guard(const common_params & params, const std::string & hostname) {
    const bool is_socket = string_ends_with(hostname, ".sock");

    hosts       = split_list(params.allowed_hosts);
    is_any_host = is_socket || std::find(hosts.begin(), hosts.end(), "*") != hosts.end();

    if (!is_socket) {
        hosts.push_back(to_lower(hostname));
    }

    // the names under which a network knows this machine, and those under which its containers do
    char name[256] = {};
    if (gethostname(name, sizeof(name) - 1) == 0 && name[0] != '\0') {
        const std::string full  = to_lower(name);
        const std::string first = full.substr(0, full.find('.'));
        hosts.insert(hosts.end(), { full, first, first + ".local" });
    }
    hosts.insert(hosts.end(), { "localhost", ".localhost", "host.docker.internal", "host.containers.internal" });

    origins         = split_list(params.cors_origins);
    is_any_origin   = std::find(origins.begin(), origins.end(), "*")         != origins.end();
    is_local_origin = std::find(origins.begin(), origins.end(), "localhost") != origins.end();
    is_credentials  = params.cors_credentials;
}

bool server_guard::is_own_host(const std::string & host) const {
    if (is_any_host || host.empty() || is_address(host)) {
        return true;
    }

    const std::string name = host_of(host);

    return std::any_of(hosts.begin(), hosts.end(), [&](const std::string & own) {
        return own.front() == '.' ? string_ends_with(name, own) : name == own;
    });
}

bool server_guard::is_listed(const std::string & origin) const {
    const auto parts = parse_origin(origin);

    if (is_any_origin || (is_local_origin && is_loopback(parts.authority))) {
        return true;
    }

    return std::any_of(origins.begin(), origins.end(), [&](const std::string & listed) {
        return listed == origin || (!parts.scheme.empty() && listed == parts.scheme + "://*");
    });
}

std::string server_guard::refusal(const std::string & host_header, const std::string & origin_header) const {
    const std::string host   = to_lower(host_header);
    const std::string origin = to_lower(origin_header);

    if (!is_own_host(host)) {
        return "this server does not answer to the name '" + host_of(host) + "' (--allowed-hosts " + host_of(host) + " makes it do so)";
    }

    if (origin.empty() || is_listed(origin)) {
        return "";
    }

    // our own page
    const auto parts = parse_origin(origin);
    if (!parts.authority.empty() &&
            without_default_port(parts.scheme, parts.authority) == without_default_port(parts.scheme, host)) {
        return "";
    }

    return "the web page '" + origin + "' may not use this server (--cors-origins " + origin + " lets it)";
}

std::string server_guard::allow_origin(const std::string & origin) const {
    if (is_any_origin) {
        // credentials are not sent to a server that allows just anyone, so the origin is named
        return is_credentials ? origin : "*";
    }

    return !origin.empty() && is_listed(to_lower(origin)) ? origin : "";
}

std::string server_guard_api_key(const std::string & authorization) {
    static const std::string scheme = "bearer ";

    if (to_lower(authorization.substr(0, scheme.size())) == scheme) {
        return string_strip(authorization.substr(scheme.size()));
    }

    return authorization;
}
