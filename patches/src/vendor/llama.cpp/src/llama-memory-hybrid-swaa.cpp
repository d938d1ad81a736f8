// The memory of a hybrid model with a schedule: a llama_kv_cache_swaa and a llama_memory_recurrent, kept in step
//
// Relies on, of llama.cpp:
//   - llama_memory_hybrid and its context, which this does as: what changes there may have to here
//   - llama_memory_recurrent takes ubatches with as many tokens of each sequence, and seq_rm() of it fails without a change
//   - the graphs of hybrid models come by llm_graph_context::build_inp_mem_hybrid(), and take no more than get_recr() of the
//     memory's context (lfm2.cpp)

#include "llama-memory-hybrid-swaa.h"

#include "llama-batch.h"
#include "llama-cparams.h"
#include "llama-graph-swaa.h"
#include "llama-impl.h"
#include "llama-model.h"

#include <algorithm>

//
// llama_memory_hybrid_swaa
//

llama_memory_hybrid_swaa::llama_memory_hybrid_swaa(
        const llama_model & model,
                ggml_type   type_k,
                ggml_type   type_v,
      const llama_cparams & cparams,
    const layer_filter_cb & filter_recr) :
    mem_attn(new llama_kv_cache_swaa(model, type_k, type_v, cparams, false, nullptr)),
    mem_recr(new llama_memory_recurrent(
        model,
        GGML_TYPE_F32,
        GGML_TYPE_F32,
        cparams.offload_kqv,
        cparams.n_seq_max,
        cparams.n_seq_max,
        cparams.n_rs_seq,
        filter_recr == nullptr ?
            [&](int32_t il) { return model.hparams.is_recr(il); }
            : filter_recr
    )) {
    GGML_ASSERT(cparams.n_rs_seq == 0);
}

llama_memory_context_ptr llama_memory_hybrid_swaa::init_batch(llama_batch_allocr & balloc, uint32_t n_ubatch, bool embd_all) {
    const auto status = mem_attn->check_batch(balloc);
    if (status != LLAMA_MEMORY_STATUS_SUCCESS) {
        return std::make_unique<llama_memory_hybrid_swaa_context>(status);
    }

    auto split = mem_attn->split_batch(balloc, n_ubatch, true, embd_all);
    if (!split) {
        return std::make_unique<llama_memory_hybrid_swaa_context>(LLAMA_MEMORY_STATUS_FAILED_PREPARE);
    }

    if (!mem_recr->prepare(split->ubatches)) {
        LLAMA_LOG_ERROR("%s: failed to prepare recurrent ubatches\n", __func__);
        return std::make_unique<llama_memory_hybrid_swaa_context>(LLAMA_MEMORY_STATUS_FAILED_PREPARE);
    }

    // note: here we copy the ubatches, as llama_memory_hybrid_context does
    auto ubatches = split->ubatches;

    auto ctx_attn = mem_attn->init_split(std::move(*split));
    if (ctx_attn->get_status() != LLAMA_MEMORY_STATUS_SUCCESS) {
        LLAMA_LOG_ERROR("%s: failed to prepare attention ubatches\n", __func__);
        return std::make_unique<llama_memory_hybrid_swaa_context>(ctx_attn->get_status());
    }

    auto ctx_recr = std::make_unique<llama_memory_recurrent_context>(mem_recr.get(), ubatches);

    return std::make_unique<llama_memory_hybrid_swaa_context>(std::move(ctx_attn), std::move(ctx_recr), std::move(ubatches));
}

llama_memory_context_ptr llama_memory_hybrid_swaa::init_full() {
    return std::make_unique<llama_memory_hybrid_swaa_context>(mem_attn->init_full(), mem_recr->init_full());
}

std::vector<llama_memory_context_ptr> llama_memory_hybrid_swaa::init_full_forms() {
    std::vector<llama_memory_context_ptr> res;
    for (auto & ctx_attn : mem_attn->init_full_forms()) {
        res.push_back(std::make_unique<llama_memory_hybrid_swaa_context>(std::move(ctx_attn), mem_recr->init_full()));
    }
    return res;
}

llama_memory_context_ptr llama_memory_hybrid_swaa::init_update(llama_context * lctx, bool optimize) {
    return std::make_unique<llama_memory_hybrid_swaa_context>(
            mem_attn->init_update(lctx, optimize), mem_recr->init_update(lctx, optimize));
}

bool llama_memory_hybrid_swaa::get_can_shift() const {
    // shifting is trivially supported for recurrent
    return mem_attn->get_can_shift();
}

bool llama_memory_hybrid_swaa::get_can_non_causal() const {
    return mem_attn->get_can_non_causal();
}

bool llama_memory_hybrid_swaa::get_can_train() const {
    return mem_attn->get_can_train();
}

uint32_t llama_memory_hybrid_swaa::get_n_nodes_extra(uint32_t n_tokens) const {
    return mem_attn->get_n_nodes_extra(n_tokens);
}

void llama_memory_hybrid_swaa::clear(bool data) {
    mem_attn->clear(data);
    mem_recr->clear(data);
}

bool llama_memory_hybrid_swaa::seq_rm(llama_seq_id seq_id, llama_pos p0, llama_pos p1) {
    return mem_attn->can_seq_rm(seq_id, p0, p1) && mem_recr->seq_rm(seq_id, p0, p1) && mem_attn->seq_rm(seq_id, p0, p1);
}

void llama_memory_hybrid_swaa::seq_cp(llama_seq_id seq_id_src, llama_seq_id seq_id_dst, llama_pos p0, llama_pos p1) {
    if (p0 > 0 || (p1 >= 0 && p1 <= seq_pos_max(seq_id_src))) {
        LLAMA_LOG_ERROR("%s: a recurrent state holds all of its sequence, of which positions %d to %d cannot be copied, nothing is copied\n", __func__, p0, p1);
        return;
    }

    mem_attn->seq_cp(seq_id_src, seq_id_dst, p0, p1);
    mem_recr->seq_cp(seq_id_src, seq_id_dst, p0, p1);
}

void llama_memory_hybrid_swaa::seq_keep(llama_seq_id seq_id) {
    mem_attn->seq_keep(seq_id);
    mem_recr->seq_keep(seq_id);
}

void llama_memory_hybrid_swaa::seq_add(llama_seq_id seq_id, llama_pos p0, llama_pos p1, llama_pos shift) {
    mem_attn->seq_add(seq_id, p0, p1, shift);

    // both or none
    if (get_can_shift()) {
        mem_recr->seq_add(seq_id, p0, p1, shift);
    }
}

void llama_memory_hybrid_swaa::seq_div(llama_seq_id seq_id, llama_pos p0, llama_pos p1, int d) {
    mem_attn->seq_div(seq_id, p0, p1, d);

    if (get_can_shift()) {
        mem_recr->seq_div(seq_id, p0, p1, d);
    }
}

llama_pos llama_memory_hybrid_swaa::seq_pos_min(llama_seq_id seq_id) const {
    // the min of the total cache is the max of the two caches' min values
    return std::max(mem_attn->seq_pos_min(seq_id), mem_recr->seq_pos_min(seq_id));
}

llama_pos llama_memory_hybrid_swaa::seq_pos_max(llama_seq_id seq_id) const {
    // the max of the total cache is the min of the two caches' max values
    return std::min(mem_attn->seq_pos_max(seq_id), mem_recr->seq_pos_max(seq_id));
}

std::map<ggml_backend_buffer_type_t, size_t> llama_memory_hybrid_swaa::memory_breakdown() const {
    auto mb = mem_attn->memory_breakdown();
    for (const auto & [buft, size] : mem_recr->memory_breakdown()) {
        mb[buft] += size;
    }
    return mb;
}

bool llama_memory_hybrid_swaa::has_attn(llama_state_seq_flags flags) const {
    return (flags & LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY) == 0 || mem_attn->get_ring();
}

void llama_memory_hybrid_swaa::state_write(llama_io_write_i & io, llama_seq_id seq_id, llama_state_seq_flags flags) const {
    if (has_attn(flags)) {
        mem_attn->state_write(io, seq_id, flags);
    }
    mem_recr->state_write(io, seq_id, flags);
}

void llama_memory_hybrid_swaa::state_read(llama_io_read_i & io, llama_seq_id seq_id, llama_state_seq_flags flags) {
    if (has_attn(flags)) {
        mem_attn->state_read(io, seq_id, flags);
    }

    try {
        mem_recr->state_read(io, seq_id, flags);
    } catch (...) {
        // the attention part is already restored - undo it
        if (has_attn(flags)) {
            mem_attn->state_clear(seq_id);
        }

        throw;
    }
}

llama_kv_cache_swaa * llama_memory_hybrid_swaa::get_mem_attn() const {
    return mem_attn.get();
}

//
// llama_memory_hybrid_swaa_context
//

llama_memory_hybrid_swaa_context::llama_memory_hybrid_swaa_context(llama_memory_status status) : llama_memory_hybrid_context(status) {}

llama_memory_hybrid_swaa_context::llama_memory_hybrid_swaa_context(
           llama_memory_context_ptr   ctx_attn,
           llama_memory_context_ptr   ctx_recr,
        std::vector<llama_ubatch>     ubatches) :
    llama_memory_hybrid_context(std::move(ctx_attn), std::move(ctx_recr), std::move(ubatches)) {
}

std::unique_ptr<llm_graph_input_attn_kv> llama_memory_hybrid_swaa_context::build_attn_inp_kv(
                ggml_context * ctx,
          const llama_ubatch & ubatch,
         const llama_hparams & hparams,
         const llama_cparams & cparams) const {
    return get_attn_swaa()->build_attn_inp_kv(ctx, ubatch, hparams, cparams);
}

const llama_kv_cache_swaa_context * llama_memory_hybrid_swaa_context::get_attn_swaa() const {
    return static_cast<const llama_kv_cache_swaa_context *>(get_attn_i());
}
