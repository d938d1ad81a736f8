#pragma once

// The schedule of a model, sliding window attention adaptation: what it is, its keys in the model's file and in saved states
// and llama_model_swaa_set(). What it does is in llama-kv-cache-swaa.h, llama-graph-swaa.h and llama-swaa-mask.h.

#include "llama.h"

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

struct llama_hparams;
struct llama_model;
struct llama_model_loader;
struct gguf_context;

class llama_io_write_i;
class llama_io_read_i;

// starts the state of a memory with a schedule, "swaa" in the file
static constexpr uint32_t LLAMA_SWAA_STATE_MAGIC = 0x61617773;

//
// llama_swaa_schedule
//

// SWAA: Sliding Window Attention Adaptation, https://arxiv.org/abs/2512.10411
//
// what each layer of a full attention model may see, for a key at position p0 and a query at position p1:
//
//   full:    p0 <= p1
//   window:  p0 <= p1 && (p1 - p0 < window || p0 < n_sink)
//
// a LLAMA_SWAA_MODE_FULL layer is always full, a LLAMA_SWAA_MODE_ALWAYS layer is always windowed and a
// LLAMA_SWAA_MODE_PREFILL layer is windowed for the tokens of the prompt and full for the generated ones
// a layer with a sliding window of the model's own keeps that and stands as LLAMA_SWAA_MODE_FULL, see llama_swaa_own_window()
// a layer without attention, as the recurrent ones of a hybrid model are, stands as LLAMA_SWAA_MODE_FULL
struct llama_swaa_schedule {
    uint32_t window = 0;
    uint32_t n_sink = 0;

    // how many tokens at the end of a prompt are decoded, for whoever tells the memory where prompts end
    // it decides nothing of what a memory holds, so states of another tail are as good
    uint32_t n_tail = 0;

    std::vector<uint8_t> modes; // llama_swaa_mode of each layer, empty: no schedule

    // true if at least one layer is windowed
    bool any() const;

    bool has(llama_swaa_mode mode) const;

    llama_swaa_mode mode(int32_t il) const;

    // whether a memory holds and shows the same under both, whatever their tails
    bool is_compatible(const llama_swaa_schedule & other) const;

    // short description of what a memory holds and shows, for logs and errors
    std::string str() const;

    void state_write(llama_io_write_i & io) const;

    // throws if the state was written under another schedule
    void state_check(llama_io_read_i & io) const;
};

// what a drafted token sees, see llama_model_swaa_set_draft()
struct llama_swaa_draft {
    uint32_t window = 0; // 0: there are no drafts
    uint32_t n_sink = 0;
};

// the sliding window of the model's own that the layer has, 0 if it has none
uint32_t llama_swaa_own_window(const llama_hparams & hparams, uint32_t il);

// true if the layer can have any mode
bool llama_swaa_can_slide(const llama_hparams & hparams, uint32_t il);

// the layer whose KV cache the layer attends to, itself in most models
uint32_t llama_swaa_kv_layer(const llama_hparams & hparams, uint32_t il);

// true if the layer has attention, and with it a KV cache
bool llama_swaa_has_attn(const llama_model & model, uint32_t il);

// read the schedule from the keys swaa.* of the model's file, if there are any
// throws if they are incomplete or malformed or if the model cannot have a schedule
void llama_swaa_load(llama_model & model, const llama_model_loader & ml);

// write the keys swaa.*, if the model has a schedule
void llama_swaa_save(const llama_model & model, gguf_context * meta);
