// What one request may cost, see server-limits.h
//
// Relies on, of the server: server.cpp's ex_wrapper(), through which every handler with a body is called, before anything
// parses it; and what common/json.cpp makes of a value, a string, an object and a member: the limits are sized by that.

#include "server-limits.h"

#include <vector>

#if defined(__GLIBC__)
#include <malloc.h>
#endif

static constexpr size_t LARGE_BODY_BYTES = 64*1024;

void server_limits_check(const char * what, size_t n, size_t n_max) {
    if (n > n_max) {
        throw std::invalid_argument("the request has " + std::to_string(n) + " " + what + ", and " + std::to_string(n_max) + " are allowed");
    }
}

void server_limits_check_body(const std::string & body) {
    struct container {
        bool   is_object;
        size_t n_members;
    };

    std::vector<container> open;

    size_t n_values       = 0;
    size_t n_strings      = 0;
    size_t n_objects      = 0;
    size_t n_member_pairs = 0; // a member is looked for among those before it
    bool   in_string      = false;

    // a loose reading that counts no less than a parser does: what is no JSON is the parser's to tell
    for (size_t i = 0; i < body.size(); i++) {
        const char c = body[i];
        if (in_string) {
            if (c == '\\') {
                i++;
            } else if (c == '"') {
                in_string = false;
            }
            continue;
        }
        switch (c) {
            case '"':
                in_string = true;
                n_strings++;
                break;
            case '{':
                n_objects++;
                n_values++;
                open.push_back({ true, 0 });
                break;
            case '[':
                n_values++;
                open.push_back({ false, 0 });
                break;
            case '}':
            case ']':
                if (!open.empty()) {
                    open.pop_back();
                }
                break;
            case ',':
                n_values++;
                break;
            case ':':
                if (!open.empty() && open.back().is_object) {
                    n_member_pairs += open.back().n_members++;
                    server_limits_check("members in an object", open.back().n_members, SERVER_MAX_MEMBERS);
                }
                break;
            default:
                break;
        }
        if (open.size() > SERVER_MAX_OBJECTS) {
            break; // too deep, see common/json.cpp
        }
    }

    server_limits_check("values",  n_values,  SERVER_MAX_VALUES);
    server_limits_check("strings", n_strings, SERVER_MAX_STRINGS);
    server_limits_check("objects", n_objects, SERVER_MAX_OBJECTS);
    if (n_member_pairs > SERVER_MAX_MEMBERS*SERVER_MAX_MEMBERS) {
        throw std::invalid_argument("the objects of the request have too many members");
    }
}

void server_limits_trim(size_t n_body_bytes) {
#if defined(__GLIBC__)
    if (n_body_bytes > LARGE_BODY_BYTES) {
        malloc_trim(0);
    }
#else
    (void) n_body_bytes;
#endif
}
