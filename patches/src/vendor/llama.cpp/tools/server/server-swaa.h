#pragma once

#include "common.h"
#include "llama.h"
#include "server-common.h"

#include <string>

// Sliding window attention adaptation in the server, see llama_model_swaa_set()

// whether the memory goes back to its checkpoints alone: it keeps rings, or states of recurrent layers, with a schedule or not
bool server_swaa_needs_checkpoints(const llama_context * ctx);

// the schedule as the server tells it, null if there is none
json server_swaa_props(const llama_model * model);

// what a request says of the tail of its prompt, throws if it is not a number of tokens
int32_t server_swaa_parse_tail(const json & value);

// why the server cannot do what the parameters ask for under the schedule of the model, empty: it can
// ctx_dft - of the draft model or NULL
std::string server_swaa_refusal(const llama_model * model, const llama_context * ctx_dft, const common_params & params);

// the same for drafts through a window, with or without a schedule
std::string server_swaa_refusal_window(const common_params & params);

// whether drafts can always be removed from the memory again, or else need checkpoints
bool server_swaa_can_roll_back(const llama_context * ctx, const common_params & params);

// the largest number of tokens before the next one that the memory has to hold
// a ring holds what the next token sees, so less than n_swa of upstream's caches will do; a recurrent state is of one position
int32_t server_swaa_n_back(const llama_context * ctx, int32_t n_swa);
