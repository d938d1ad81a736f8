#pragma once

// The memory of a hybrid model with a schedule, see llama-swaa.h: its layers with attention have the caches of a
// llama_kv_cache_swaa, the recurrent ones their states
//
// llama_model::create_memory() makes it.

#include "llama-kv-cache-swaa.h"
#include "llama-memory-hybrid.h"
#include "llama-memory-recurrent.h"

#include <memory>
#include <vector>

//
// llama_memory_hybrid_swaa
//

// as llama_memory_hybrid. a recurrent state holds all tokens of its sequence, whatever the phase that they are read in
class llama_memory_hybrid_swaa : public llama_memory_i {
public:
    // filter_recr - nullptr: the layers that hparams.is_recr() tells
    llama_memory_hybrid_swaa(
            const llama_model & model,
                    ggml_type   type_k,
                    ggml_type   type_v,
          const llama_cparams & cparams,
        const layer_filter_cb & filter_recr);

    ~llama_memory_hybrid_swaa() = default;

    //
    // llama_memory_i
    //

    llama_memory_context_ptr init_batch(
            llama_batch_allocr & balloc,
            uint32_t n_ubatch,
            bool embd_all) override;

    llama_memory_context_ptr init_full() override;

    std::vector<llama_memory_context_ptr> init_full_forms() override;

    llama_memory_context_ptr init_update(llama_context * lctx, bool optimize) override;

    bool get_can_shift()      const override;
    bool get_can_non_causal() const override;
    bool get_can_train()      const override;

    uint32_t get_n_nodes_extra(uint32_t n_tokens) const override;

    void clear(bool data) override;

    // false, without removing anything, if the state holds what would be removed or a ring has dropped what would be seen
    bool seq_rm  (llama_seq_id seq_id,                              llama_pos p0, llama_pos p1) override;
    // a whole sequence alone: its state cannot be divided
    void seq_cp  (llama_seq_id seq_id_src, llama_seq_id seq_id_dst, llama_pos p0, llama_pos p1) override;
    void seq_keep(llama_seq_id seq_id)                                                          override;
    void seq_add (llama_seq_id seq_id,                              llama_pos p0, llama_pos p1, llama_pos shift) override;
    void seq_div (llama_seq_id seq_id,                              llama_pos p0, llama_pos p1, int d) override;

    llama_pos seq_pos_min(llama_seq_id seq_id) const override;
    llama_pos seq_pos_max(llama_seq_id seq_id) const override;

    std::map<ggml_backend_buffer_type_t, size_t> memory_breakdown() const override;

    // state write/load

    void state_write(llama_io_write_i & io, llama_seq_id seq_id = -1, llama_state_seq_flags flags = 0) const override;
    void state_read (llama_io_read_i  & io, llama_seq_id seq_id = -1, llama_state_seq_flags flags = 0) override;

    //
    // llama_memory_hybrid_swaa specific API
    //

    llama_kv_cache_swaa * get_mem_attn() const;

private:
    const std::unique_ptr<llama_kv_cache_swaa>    mem_attn;
    const std::unique_ptr<llama_memory_recurrent> mem_recr;

    // a partial state is of what cannot be cut: the recurrent states, and a ring
    bool has_attn(llama_state_seq_flags flags) const;
};

class llama_memory_hybrid_swaa_context : public llama_memory_hybrid_context {
public:
    // used for errors
    llama_memory_hybrid_swaa_context(llama_memory_status status);

    // ctx_attn - a llama_kv_cache_swaa_context
    // ubatches - none for a full-cache or an update context
    llama_memory_hybrid_swaa_context(
           llama_memory_context_ptr   ctx_attn,
           llama_memory_context_ptr   ctx_recr,
        std::vector<llama_ubatch>     ubatches = {});

    ~llama_memory_hybrid_swaa_context() = default;

    //
    // llama_memory_context_i
    //

    std::unique_ptr<llm_graph_input_attn_kv> build_attn_inp_kv(
                    ggml_context * ctx,
              const llama_ubatch & ubatch,
             const llama_hparams & hparams,
             const llama_cparams & cparams) const override;

    //
    // llama_memory_hybrid_swaa_context specific API
    //

    // instead of get_attn(), which is of a llama_kv_cache
    const llama_kv_cache_swaa_context * get_attn_swaa() const;
};
