#pragma once

#include <cstddef>
#include <new>
#include <stdexcept>
#include <string>

// What one request may cost. Whoever can reach the server can send anything: it must not crash, stall or fill the memory.
//
// note: what is nested too deep is refused where it is parsed: JSON in common/json.cpp, schemas in common/json-schema.cpp,
//       grammars in src/llama-grammar.cpp

// of the body, before it is parsed
constexpr size_t SERVER_MAX_BODY_BYTES       =  16u*1024*1024;
constexpr size_t SERVER_MAX_BODY_BYTES_MEDIA = 100u*1024*1024; // with --mmproj
constexpr size_t SERVER_MAX_BODIES           = 2;              // of the largest size at a time, or more of smaller ones ...
constexpr size_t SERVER_FREE_BODY_BYTES      = 64*1024;        // not counting the first bytes of each, so that small ones are always served
constexpr size_t SERVER_MAX_VALUES           = 4000000;        // of JSON, of them ...
constexpr size_t SERVER_MAX_STRINGS          =  500000;        // names of members among them
constexpr size_t SERVER_MAX_OBJECTS          =   50000;
constexpr size_t SERVER_MAX_MEMBERS          =   16384;        // of one object

// of its parts
constexpr size_t SERVER_MAX_MESSAGES         = 10000;
constexpr size_t SERVER_MAX_TOOLS            = 1024;
constexpr size_t SERVER_MAX_PROMPTS          = 2048;           // inputs of embeddings and documents to rank among them
constexpr size_t SERVER_MAX_PROMPTS_BYTES    = 256u*1024*1024; // of the parameters that each of them keeps
constexpr size_t SERVER_MAX_STOPS            = 1024;
constexpr size_t SERVER_MAX_SAMPLERS         = 64;
constexpr size_t SERVER_MAX_BREAKERS         = 64;
constexpr size_t SERVER_MAX_FIELDS           = 100;
constexpr size_t SERVER_MAX_TRIGGERS         = 1024;
constexpr int    SERVER_MAX_LAST_N           = 1024*1024;
constexpr int    SERVER_MAX_PROBS            = 128;            // for as many tokens as the context has
constexpr size_t SERVER_MAX_PROBS_TOTAL      = 4000000;        // more than that: times the tokens to generate

// of all requests
constexpr size_t SERVER_MAX_STREAMS          = 64;             // answers that are kept for clients who come back, and are done

// throws std::invalid_argument, with the number and the limit, if there are more
void server_limits_check(const char * what, size_t n, size_t n_max);

// throws std::invalid_argument if the JSON would cost too much to parse
void server_limits_check_body(const std::string & body);

// the memory of a large request goes back to the system, which the allocator would keep for the next one
void server_limits_trim(size_t n_body_bytes);

// what fails while a request is read is the fault of the client: every error becomes std::invalid_argument
template <typename F>
auto server_limits_read(F && read) -> decltype(read()) {
    try {
        return read();
    } catch (const std::bad_alloc &) {
        throw;
    } catch (const std::invalid_argument &) {
        throw;
    } catch (const std::exception & e) {
        throw std::invalid_argument(e.what());
    }
}
