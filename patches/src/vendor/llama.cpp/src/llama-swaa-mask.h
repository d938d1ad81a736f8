#pragma once

// Which cells of a cache an ubatch attends to and under which mask, see llama_swaa_schedule for what is visible

#include "llama.h"

#include <cstdint>
#include <vector>

struct ggml_tensor;
struct llama_model;
struct llama_ubatch;
struct llama_swaa_schedule;

class llama_kv_cache;

// the streams of the cache that the ubatch is in, each has the same number of its tokens
uint32_t llama_swaa_n_stream(const llama_kv_cache & kv, const llama_ubatch & ubatch);

//
// llama_swaa_window
//

// the cells of a cache that an ubatch can see through the window
// the tokens of each stream are divided into blocks of equal size, so that the cells are few compared to the window also
// if the ubatch is larger than it. to the attention, the blocks are more streams
class llama_swaa_window {
public:
    // to be called when the tokens of the ubatch have their cells
    llama_swaa_window(const llama_kv_cache & kv, const llama_swaa_schedule & schedule, const llama_ubatch & ubatch);

    // the number of blocks for n_tps tokens of a stream
    static uint32_t n_block(uint32_t n_tps);

    // the most cells of a block
    uint32_t size() const;

    // I32 [n_gather*n_stream*n_block], rows of the cache with its streams one after the other
    void set_input_idxs(ggml_tensor * dst) const;

    // F32/F16 [n, n_tokens], contiguous. gather: a column for each index of the block, else for each cell of the stream
    void set_input_mask(ggml_tensor * dst, const llama_ubatch & ubatch, bool gather) const;

private:
    struct block {
        llama_seq_id seq_id; // of the first token
        bool         mixed;  // there are tokens of other sequences

        // ordered by position
        std::vector<uint32_t>  cells;
        std::vector<llama_pos> pos;
    };

    const llama_kv_cache & kv;

    const llama_pos window;
    const llama_pos n_sink;

    std::vector<block> blocks;
};

//
// the causal mask over all cells, for the device to build: it is large, and the same for all tokens but in a few columns
//

// true if all devices of the model can make the mask of a shared row and a tail
bool llama_swaa_can_make_mask(const llama_model & model);

// the number of columns, the last ones, to hold what is not the same for all of n_tps tokens. 0: they are all of n_kv
uint32_t llama_swaa_n_tail(uint32_t n_tps, uint32_t n_kv);

// true if the other columns are the same for all tokens of a stream
bool llama_swaa_can_share(const llama_kv_cache & kv, const llama_ubatch & ubatch, uint32_t n_kv, uint32_t n_tail);

// F32/F16 [n_kv, 1, 1, n_stream]
void llama_swaa_set_input_shared(ggml_tensor * dst, const llama_kv_cache & kv, const llama_ubatch & ubatch);

// F32/F16 [n_tail, n_tps, 1, n_stream]
void llama_swaa_set_input_tail(ggml_tensor * dst, const llama_kv_cache & kv, const llama_ubatch & ubatch, uint32_t n_kv);
