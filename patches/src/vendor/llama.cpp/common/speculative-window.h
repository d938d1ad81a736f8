#pragma once

// Drafts of the target model itself, which sees the sinks and a window of the text alone while it makes them
//
// see llama_model_swaa_set_draft()

#include "common.h"
#include "llama.h"
#include "sampling.h"

#include <string>

// let the contexts that are made of the model from now on draft
// throws, if they cannot
void common_speculative_window_init(llama_model * model, const common_params_speculative_window & params);

// whether a token at position pos would see less through the window than without it. if not, drafts cost what decoding costs
bool common_speculative_window_hides(const common_params_speculative_window & params, llama_pos pos);

// up to n_max tokens that the model would say after id_last, which comes at position pos0 of the sequence
//   - they end before one that ends the generation
//   - smpl chooses the tokens in the end. a copy of it drafts, so that both draw the same random numbers
//   - what was drafted is removed from the memory. a ring may refuse that, if other sequences are in it: then llama_memory_seq_pos_max()
//     tells, and it has to be restored from a state
llama_tokens common_speculative_window_draft(
        llama_context  * ctx,
        common_sampler * smpl,
        llama_seq_id     seq_id,
        llama_pos        pos0,
        llama_token      id_last,
        int32_t          n_max);
