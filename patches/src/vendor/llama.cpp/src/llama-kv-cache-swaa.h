#pragma once

// The KV cache of a model with a schedule, see llama-swaa.h, and what a batch does with it
//
// llama_model::create_memory() makes it, by itself or in a llama_memory_hybrid_swaa. What attention reads from it is in
// llama-graph-swaa.h.

#include "llama-kv-cache.h"
#include "llama-swaa.h"
#include "llama-swaa-mask.h"

#include <memory>
#include <optional>
#include <vector>

//
// llama_kv_cache_swaa
//

// the KV cache of a model with a schedule (see llama_swaa_schedule), made of up to three instances of llama_kv_cache:
//   - base: LLAMA_SWAA_MODE_FULL and LLAMA_SWAA_MODE_PREFILL layers, a cell per position of the context
//   - ring: LLAMA_SWAA_MODE_ALWAYS layers, cells for the sinks, the window and the ubatch. a cell is reused as soon as
//           its position cannot be seen anymore, the sinks never are
//   - own:  layers with a sliding window of the model's own, a ring too, without sinks. the schedule has no part in it
//
// the tokens before the prompt end of their sequence are prefilled, the others are decoded, or drafted from a position on that
// is set. an ubatch does one of these

enum llama_swaa_phase {
    LLAMA_SWAA_PHASE_PREFILL,
    LLAMA_SWAA_PHASE_DECODE,
    LLAMA_SWAA_PHASE_DRAFT,
};

// a batch divided into ubatches
struct llama_swaa_split {
    std::vector<llama_ubatch>     ubatches;
    std::vector<llama_swaa_phase> phases; // of each ubatch
};

class llama_kv_cache_swaa : public llama_memory_i {
public:
    using slot_info_vec_t = llama_kv_cache::slot_info_vec_t;

    llama_kv_cache_swaa(
            const llama_model & model,
                    ggml_type   type_k,
                    ggml_type   type_v,
          const llama_cparams & cparams,
                         bool   swa_full, // all positions of the context have cells in own too
       const layer_reuse_cb & reuse);

    ~llama_kv_cache_swaa() = default;

    //
    // llama_memory_i
    //

    llama_memory_context_ptr init_batch(
            llama_batch_allocr & balloc,
            uint32_t n_ubatch,
            bool embd_all) override;

    // the graph of a prefilled ubatch, LLAMA_SWAA_FORM_WINDOW
    llama_memory_context_ptr init_full() override;

    // the other forms
    std::vector<llama_memory_context_ptr> init_full_forms() override;

    llama_memory_context_ptr init_update(llama_context * lctx, bool optimize) override;

    // positions that a ring has dropped cannot move into a window, so it can shift only without LLAMA_SWAA_MODE_ALWAYS layers
    bool get_can_shift() const override;

    bool get_can_non_causal() const override;
    bool get_can_train()      const override;

    uint32_t get_n_nodes_extra(uint32_t n_tokens) const override;

    void clear(bool data) override;

    // false, without removing anything, if the next token of the sequence would miss positions that a ring has dropped
    bool seq_rm  (llama_seq_id seq_id,                              llama_pos p0, llama_pos p1) override;
    void seq_cp  (llama_seq_id seq_id_src, llama_seq_id seq_id_dst, llama_pos p0, llama_pos p1) override;
    void seq_keep(llama_seq_id seq_id)                                                          override;
    void seq_add (llama_seq_id seq_id,                              llama_pos p0, llama_pos p1, llama_pos shift) override;
    void seq_div (llama_seq_id seq_id,                              llama_pos p0, llama_pos p1, int d) override;

    // with rings: the start of the last run of positions without a gap that all of them have
    llama_pos seq_pos_min(llama_seq_id seq_id) const override;
    llama_pos seq_pos_max(llama_seq_id seq_id) const override;

    std::map<ggml_backend_buffer_type_t, size_t> memory_breakdown() const override;

    // state write/load
    // the state carries the schedule, reading it under another one throws

    void state_write(llama_io_write_i & io, llama_seq_id seq_id = -1, llama_state_seq_flags flags = 0) const override;
    void state_read (llama_io_read_i  & io, llama_seq_id seq_id = -1, llama_state_seq_flags flags = 0) override;

    //
    // llama_kv_cache_swaa specific API
    //

    const llama_swaa_schedule & get_schedule() const;

    // nullptr if there are no layers for it
    llama_kv_cache * get_base() const;
    llama_kv_cache * get_ring() const;
    llama_kv_cache * get_own()  const;

    // true if positions are dropped that a window has left behind
    bool has_ring() const;

    // true if a layer that the schedule is for has the mode
    bool has_layers(llama_swaa_mode mode) const;

    // of a layer: whether it has attention, and whether under a window of the model's own
    bool has_attn(int32_t il) const;
    bool is_own  (int32_t il) const;

    // the steps of init_batch(), for a memory that this cache is a part of

    // LLAMA_MEMORY_STATUS_SUCCESS if the caches hold what the tokens of the batch see and have positions for them
    llama_memory_status check_batch(const llama_batch_allocr & balloc) const;

    // ubatches of one phase each. nothing if there are none for all tokens
    //   equal_seqs - with as many tokens of each sequence
    //   embd_all   - with equal_seqs: of one sequence
    std::optional<llama_swaa_split> split_batch(llama_batch_allocr & balloc, uint32_t n_ubatch, bool equal_seqs, bool embd_all) const;

    llama_memory_context_ptr init_split(llama_swaa_split split);

    // true if seq_rm() would remove the positions, which changes nothing
    bool can_seq_rm(llama_seq_id seq_id, llama_pos p0, llama_pos p1) const;

    // as llama_kv_cache::state_clear()
    void state_clear(llama_seq_id seq_id);

    // see llama_swaa_set_prompt_end()
    void set_prompt_end(llama_seq_id seq_id, llama_pos pos);

    // see llama_swaa_set_draft_start()
    bool set_draft_start(llama_seq_id seq_id, llama_pos pos);

    // what the tokens of a phase see through their window
    const llama_swaa_schedule & get_view(llama_swaa_phase phase) const;

    // what they see in the layers with a window of the model's own
    const llama_swaa_schedule & get_view_own() const;

    // true if the window of the phase hides something from a token of the ubatch
    bool is_hiding(const llama_ubatch & ubatch, llama_swaa_phase phase) const;

    // true if all devices can make the causal mask of a shared row and a tail
    bool can_make_mask() const;

    // a transposed V has no rows to gather, there the mask alone has to do
    bool can_gather() const;

    // true if attention skips the cells that the mask hides from all tokens of the ubatch: where they are is as good as gathered
    bool can_skip(const llama_ubatch & ubatch) const;

    // the number of cells of each block to gather from a cache with n_kv cells in use, if a block sees up to n_seen of them
    // 0: attending to the n_kv cells as they are is better
    uint32_t n_gather(uint32_t n_seen, uint32_t n_kv) const;

    // an upper bound for the number of cells that n_tokens tokens can see through the window
    uint32_t n_seen_max(const llama_kv_cache & kv_cur, const llama_swaa_schedule & view, uint32_t n_tokens) const;

private:
    const llama_swaa_schedule schedule; // a copy: a live context keeps its own when the model's is replaced
    const llama_swaa_schedule draft;    // the schedule with the window of the drafts, 0 if there are none
    const llama_swaa_schedule own;      // the window of the model's own

    const llama_hparams & hparams;

    const uint32_t n_ctx; // positions of a sequence
    const uint32_t n_seq_max;
    const bool     unified;
    const bool     v_trans;
    const bool     make_mask;
    const bool     on_cpu;
    const bool     has_mrope;

    const std::vector<bool> attends; // each layer

    std::unique_ptr<llama_kv_cache> kv_base;
    std::unique_ptr<llama_kv_cache> kv_ring;
    std::unique_ptr<llama_kv_cache> kv_own;

    // a cache that drops what its window has left behind
    struct ring {
        const llama_kv_cache * kv;

        llama_pos window;
        llama_pos n_sink;

        // true if it holds all that a token of the sequence at position pos can see before it
        bool holds(llama_seq_id seq_id, llama_pos pos) const;
    };

    std::vector<ring> rings;

    // all that there are
    std::vector<llama_kv_cache *> caches() const;

    std::vector<llama_pos> prompt_end;  // [LLAMA_MAX_SEQ] -1: automatic
    std::vector<llama_pos> draft_start; // [LLAMA_MAX_SEQ] -1: nothing is drafted

    // true if the prompt end moves with the positions [p0, p1)
    bool is_prompt_end_in(llama_seq_id seq_id, llama_pos p0, llama_pos p1) const;

    // the llama_swaa_phase of each token of the batch
    std::vector<int32_t> get_phases(const llama_batch & batch) const;

    // true if the batch has tokens without a text, whose positions are not in a row
    bool is_foreign(const llama_batch & batch) const;

    bool ring_check(const llama_batch_allocr & balloc) const;
};

// the forms of the graph that a full-cache context can stand for, to reserve it. at the sizes that each can have, none
// holds all others
enum llama_swaa_form {
    LLAMA_SWAA_FORM_WINDOW,      // windowed, the causal mask is made on the device
    LLAMA_SWAA_FORM_FULL,        // full width, the causal mask is an input, as in every graph for a few tokens
    LLAMA_SWAA_FORM_FULL_MADE,   // full width, the causal mask is made on the device
    LLAMA_SWAA_FORM_WINDOW_HOST, // windowed, the causal mask is an input
};

class llama_kv_cache_swaa_context : public llama_memory_context_i {
public:
    using slot_info_vec_t = llama_kv_cache::slot_info_vec_t;

    // used for errors
    llama_kv_cache_swaa_context(llama_memory_status status);

    // used to create a full-cache context
    llama_kv_cache_swaa_context(
            llama_kv_cache_swaa * kv,
            llama_swaa_form form);

    // used to create an update context
    llama_kv_cache_swaa_context(
            llama_kv_cache_swaa * kv,
            llama_context * lctx,
            bool optimize);

    // used to create a batch processing context from a batch
    llama_kv_cache_swaa_context(
            llama_kv_cache_swaa * kv,
            slot_info_vec_t sinfos_base,
            slot_info_vec_t sinfos_ring,
            slot_info_vec_t sinfos_own,
            llama_swaa_split split);

    virtual ~llama_kv_cache_swaa_context();

    //
    // llama_memory_context_i
    //

    bool next()  override;
    bool apply() override;

    llama_memory_status  get_status() const override;
    const llama_ubatch & get_ubatch() const override;

    // drafts and the passes that check them take turns
    bool has_graph_aside() const override;

    // see llama-graph-swaa.h
    std::unique_ptr<llm_graph_input_attn_kv> build_attn_inp_kv(
                    ggml_context * ctx,
              const llama_ubatch & ubatch,
             const llama_hparams & hparams,
             const llama_cparams & cparams) const override;

    std::unique_ptr<llm_graph_input_attn_kv_iswa> build_attn_inp_kv_iswa(
                    ggml_context * ctx,
              const llama_ubatch & ubatch,
             const llama_hparams & hparams,
             const llama_cparams & cparams) const override;

    //
    // llama_kv_cache_swaa_context specific API
    //

    const llama_swaa_schedule & get_schedule() const;

    const llama_kv_cache_context * get_base() const;
    const llama_kv_cache_context * get_ring() const;
    const llama_kv_cache_context * get_own()  const;

    // of the current ubatch
    llama_swaa_phase get_phase() const;

    // true if the layer attends to the base cache through a window that hides something from the current ubatch
    bool is_windowed(llama_swaa_mode mode) const;

    // true if some layer does
    bool is_windowed() const;

    // see llama_kv_cache_swaa::n_gather()
    uint32_t get_n_gather_base(const llama_ubatch & ubatch) const;
    uint32_t get_n_gather_ring(const llama_ubatch & ubatch) const;
    uint32_t get_n_gather_own (const llama_ubatch & ubatch) const;

    // see llama_swaa_n_tail(), 0: the mask of the base cache is not shared
    uint32_t get_n_tail(const llama_ubatch & ubatch) const;

    // of the current ubatch
    const llama_swaa_window & get_win_base() const;
    const llama_swaa_window & get_win_ring() const;
    const llama_swaa_window & get_win_own()  const;

    llama_kv_cache_swaa * get_kv() const;

private:
    llama_kv_cache_swaa * kv = nullptr;

    // the index of the next ubatch to process
    size_t i_next = 0;

    std::vector<llama_ubatch> ubatches;
    std::vector<llama_swaa_phase> phases; // of each ubatch

    // of a full-cache context
    const llama_swaa_form form = LLAMA_SWAA_FORM_WINDOW;

    llama_memory_context_ptr ctx_base;
    llama_memory_context_ptr ctx_ring;
    llama_memory_context_ptr ctx_own;

    llama_memory_status status;

    // all that there are
    std::vector<llama_memory_context_i *> contexts() const;

    // make them, f: of a cache
    template<typename F>
    void init(F f);

    // of the current ubatch, if it is prefilled and has to know
    std::unique_ptr<llama_swaa_window> win_base;
    std::unique_ptr<llama_swaa_window> win_ring;
    std::unique_ptr<llama_swaa_window> win_own;

    uint32_t get_n_gather(
            const llama_kv_cache & kv_cur,
            const llama_swaa_schedule & view,
            const llama_swaa_window * win,
            const llama_ubatch & ubatch,
            uint32_t n_kv) const;
};

// true if the memory is one of these
bool llama_swaa_is_memory(llama_memory_t memory);
