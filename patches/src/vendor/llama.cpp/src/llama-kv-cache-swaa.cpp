// The KV cache of a model with a schedule: its caches, the phases of the tokens, and what the ring still holds
//
// Relies on, of llama.cpp:
//   - llama_kv_cache with n_sink >= 0, which is a ring (patch "a KV cache that is a ring with sinks"): which cells it
//     overwrites, that prepare() undoes what it tries, and that a state of one sequence has its sinks
//   - llama_kv_cells::seq_pos_get(), the positions of a sequence in order
//   - llama_batch_allocr::split_reset() with groups (patch "split a batch between groups of tokens"), and
//     llama_ubatch::data->batch_idxs, a token's place in the batch
//   - llama_memory_i::init_full_forms() and get_n_nodes_extra() (patch "reserve a graph of each form that a memory has")
//   - a batch of tokens has positions in one dimension also with M-RoPE, one of embeddings has them in several
//   - llama_kv_cache_iswa and its context, which hold two caches in the same manner: what changes there may have to here

#include "llama-kv-cache-swaa.h"

#include "llama-batch.h"
#include "llama-context.h"
#include "llama-graph-swaa.h"
#include "llama-impl.h"
#include "llama-io.h"
#include "llama-memory-hybrid-swaa.h"
#include "llama-model.h"

#include <algorithm>
#include <limits>
#include <stdexcept>

// the attention width of a graph grows in such steps, so that graphs can be reused and the fast kernels apply
static constexpr uint32_t LLAMA_SWAA_N_PAD = 256;

// for so many tokens of a stream, flash attention on the CPU walks the cells that some of them see (flash-attn-decode.cpp)
static constexpr uint32_t LLAMA_SWAA_N_SKIP = 8;

//
// llama_kv_cache_swaa
//

// without a schedule all layers are full
static llama_swaa_schedule llama_swaa_get_schedule(const llama_model & model) {
    llama_swaa_schedule res = model.swaa;
    if (!res.any()) {
        res.modes.assign(model.hparams.n_layer(), LLAMA_SWAA_MODE_FULL);
    }
    return res;
}

static llama_swaa_schedule llama_swaa_get_draft(const llama_model & model) {
    llama_swaa_schedule res = llama_swaa_get_schedule(model);
    res.window = model.swaa_draft.window;
    res.n_sink = model.swaa_draft.n_sink;
    return res;
}

static bool llama_swaa_is_on_cpu(const llama_model & model) {
    for (uint32_t il = 0; il < model.hparams.n_layer(); ++il) {
        ggml_backend_dev_t dev = model.dev_layer(il);

        if (dev && ggml_backend_dev_type(dev) != GGML_BACKEND_DEVICE_TYPE_CPU) {
            return false;
        }
    }

    return true;
}

static std::vector<bool> llama_swaa_get_attends(const llama_model & model) {
    std::vector<bool> res;
    for (uint32_t il = 0; il < model.hparams.n_layer(); ++il) {
        res.push_back(llama_swaa_has_attn(model, il));
    }
    return res;
}

// the window of the model's own, which is none of the schedule's
static llama_swaa_schedule llama_swaa_get_own(const llama_model & model) {
    llama_swaa_schedule res;
    for (uint32_t il = 0; il < model.hparams.n_layer(); ++il) {
        res.window = std::max(res.window, llama_swaa_own_window(model.hparams, il));
    }
    return res;
}

llama_kv_cache_swaa::llama_kv_cache_swaa(
        const llama_model & model,
                ggml_type   type_k,
                ggml_type   type_v,
      const llama_cparams & cparams,
                     bool   swa_full,
     const layer_reuse_cb & reuse) :
    schedule(llama_swaa_get_schedule(model)), draft(llama_swaa_get_draft(model)), own(llama_swaa_get_own(model)), hparams(model.hparams),
    n_ctx(cparams.n_ctx_seq), n_seq_max(cparams.n_seq_max), unified(cparams.kv_unified),
    v_trans(!cparams.flash_attn), make_mask(llama_swaa_can_make_mask(model)), on_cpu(llama_swaa_is_on_cpu(model)), has_mrope(model.hparams.n_pos_per_embd() > 1), attends(llama_swaa_get_attends(model)), prompt_end(LLAMA_MAX_SEQ, -1), draft_start(LLAMA_MAX_SEQ, -1) {
    if (!cparams.causal_attn) {
        throw std::runtime_error("a swaa schedule needs causal attention");
    }

    LLAMA_LOG_INFO("%s: %s\n", __func__, schedule.str().c_str());
    if (draft.window > 0) {
        LLAMA_LOG_INFO("%s: drafts see a window of %u tokens and %u sinks\n", __func__, draft.window, draft.n_sink);
    }

    const auto in_own  = [&](int32_t il) { return has_attn(il) && is_own(il); };
    const auto in_ring = [&](int32_t il) { return has_attn(il) && !is_own(il) && schedule.mode(il) == LLAMA_SWAA_MODE_ALWAYS; };
    const auto in_base = [&](int32_t il) { return has_attn(il) && !is_own(il) && schedule.mode(il) != LLAMA_SWAA_MODE_ALWAYS; };

    // the window and the ubatch, all of a padded size
    const auto n_cells = [&](uint64_t n_seen) {
        const uint32_t n_need = std::min<uint64_t>(n_ctx, n_seen*(unified ? n_seq_max : 1) + cparams.n_ubatch);

        return std::min<uint32_t>(n_ctx, GGML_PAD(n_need, LLAMA_SWAA_N_PAD));
    };

    if (has_layers(LLAMA_SWAA_MODE_FULL) || has_layers(LLAMA_SWAA_MODE_PREFILL)) {
        LLAMA_LOG_INFO("%s: creating base KV cache, size = %u cells\n", __func__, n_ctx);

        kv_base = std::make_unique<llama_kv_cache>(
                model, model.hparams, type_k, type_v,
                v_trans, cparams.offload_kqv, unified, n_ctx, n_seq_max, 1,
                0, LLAMA_SWA_TYPE_NONE, nullptr, in_base, reuse, nullptr);
    }

    if (has_layers(LLAMA_SWAA_MODE_ALWAYS)) {
        const uint32_t n_ring = n_cells((uint64_t) schedule.n_sink + schedule.window);

        LLAMA_LOG_INFO("%s: creating ring KV cache, size = %u cells, its positions cannot be shifted\n", __func__, n_ring);

        kv_ring = std::make_unique<llama_kv_cache>(
                model, model.hparams, type_k, type_v,
                v_trans, cparams.offload_kqv, unified, n_ring, n_seq_max, 1,
                schedule.window, LLAMA_SWA_TYPE_STANDARD, nullptr, in_ring, reuse, nullptr, "", (int32_t) schedule.n_sink);

        rings.push_back({ kv_ring.get(), (llama_pos) schedule.window, (llama_pos) schedule.n_sink });
    }

    if (own.window > 0) {
        const uint32_t n_own = swa_full ? n_ctx : n_cells(own.window);

        LLAMA_LOG_INFO("%s: creating KV cache of the model's own window of %u tokens, size = %u cells\n", __func__, own.window, n_own);

        kv_own = std::make_unique<llama_kv_cache>(
                model, model.hparams, type_k, type_v,
                v_trans, cparams.offload_kqv, unified, n_own, n_seq_max, 1,
                own.window, LLAMA_SWA_TYPE_STANDARD, nullptr, in_own, reuse, nullptr, "", 0);

        rings.push_back({ kv_own.get(), (llama_pos) own.window, 0 });
    }
}

std::vector<llama_kv_cache *> llama_kv_cache_swaa::caches() const {
    std::vector<llama_kv_cache *> res;
    for (auto * kv : { kv_base.get(), kv_ring.get(), kv_own.get() }) {
        if (kv) {
            res.push_back(kv);
        }
    }
    return res;
}

bool llama_kv_cache_swaa::has_layers(llama_swaa_mode mode) const {
    for (size_t il = 0; il < schedule.modes.size(); ++il) {
        if (schedule.modes[il] == mode && has_attn(il) && !is_own(il)) {
            return true;
        }
    }
    return false;
}

bool llama_kv_cache_swaa::has_attn(int32_t il) const {
    return (size_t) il < attends.size() && attends[il];
}

bool llama_kv_cache_swaa::is_own(int32_t il) const {
    return !llama_swaa_can_slide(hparams, il);
}

bool llama_kv_cache_swaa::has_ring() const {
    return kv_ring || (kv_own && kv_own->get_size() < n_ctx);
}

void llama_kv_cache_swaa::clear(bool data) {
    for (auto * kv : caches()) {
        kv->clear(data);
    }
}

bool llama_kv_cache_swaa::ring::holds(llama_seq_id seq_id, llama_pos pos) const {
    const auto & seq_pos = kv->get_cells(seq_id).seq_pos_get(seq_id);

    const auto has = [&](llama_pos p0, llama_pos p1) {
        auto it = seq_pos.lower_bound({ p0, 0 });
        for (llama_pos p = p0; p < p1; ++p, ++it) {
            if (it == seq_pos.end() || it->first != p) {
                return false;
            }
        }
        return true;
    };

    // the position before is needed also with a window of 1, it tells where the sequence goes on
    const llama_pos n_seen = std::max(window, 2);

    return has(0, std::min(n_sink, pos)) && has(std::max(0, pos - n_seen + 1), pos);
}

bool llama_kv_cache_swaa::can_seq_rm(llama_seq_id seq_id, llama_pos p0, llama_pos p1) const {
    p0 = std::max(0, p0);
    p1 = p1 < 0 ? std::numeric_limits<llama_pos>::max() : p1;

    // with one stream, more sequences can be held than decoded
    const llama_seq_id n_seq = unified || n_seq_max == 1 ? LLAMA_MAX_SEQ : n_seq_max;

    for (llama_seq_id s = 0; !rings.empty() && s < n_seq; ++s) {
        if (seq_id >= 0 && s != seq_id) {
            continue;
        }

        const llama_pos pos_max = seq_pos_max(s);

        // nothing to remove or nothing left to see
        if (pos_max < p0 || p1 <= p0 || (p0 == 0 && p1 > pos_max)) {
            continue;
        }

        const bool is_tail = p1 > pos_max;

        const int64_t pos_next = is_tail ? p0 : (int64_t) pos_max + 1;

        for (const auto & ring : rings) {
            // what is left has to hold what the next token can see, which a hole in it never does, unless it can be closed
            const bool ok = is_tail ? ring.holds(s, p0) : get_can_shift() ||
                (p0 >= ring.n_sink && p1 <= std::min<int64_t>(pos_max, pos_next - ring.window + 1));

            if (!ok) {
                LLAMA_LOG_DEBUG("%s: the ring does not hold what position %lld of sequence %d would see\n", __func__, (long long) pos_next, s);
                return false;
            }
        }
    }

    return true;
}

bool llama_kv_cache_swaa::seq_rm(llama_seq_id seq_id, llama_pos p0, llama_pos p1) {
    if (!can_seq_rm(seq_id, p0, p1)) {
        return false;
    }

    p0 = std::max(0, p0);
    p1 = p1 < 0 ? std::numeric_limits<llama_pos>::max() : p1;

    // the end of a prompt that falls into a hole is where the hole begins
    for (llama_seq_id s = 0; s < LLAMA_MAX_SEQ; ++s) {
        if ((seq_id < 0 || s == seq_id) && prompt_end[s] > p0 && prompt_end[s] < p1 && p1 <= seq_pos_max(s)) {
            prompt_end[s] = p0;
        }
    }

    bool res = true;

    for (auto * kv : caches()) {
        res = res & kv->seq_rm(seq_id, p0, p1);
    }

    return res;
}

void llama_kv_cache_swaa::seq_cp(llama_seq_id seq_id_src, llama_seq_id seq_id_dst, llama_pos p0, llama_pos p1) {
    for (const auto & ring : rings) {
        const bool is_whole = p0 <= 0 && (p1 < 0 || p1 > seq_pos_max(seq_id_src));

        if (!is_whole && ring.kv->get_stream(seq_id_src) != ring.kv->get_stream(seq_id_dst)) {
            LLAMA_LOG_ERROR("%s: only whole sequences are copied between streams, nothing is copied\n", __func__);
            return;
        }
        if (!is_whole && p1 >= 0 && !ring.holds(seq_id_src, p1)) {
            LLAMA_LOG_ERROR("%s: the ring does not hold what position %d of sequence %d would see, nothing is copied\n", __func__, p1, seq_id_src);
            return;
        }
    }

    for (auto * kv : caches()) {
        kv->seq_cp(seq_id_src, seq_id_dst, p0, p1);
    }

    prompt_end[seq_id_dst] = prompt_end[seq_id_src];
}

void llama_kv_cache_swaa::seq_keep(llama_seq_id seq_id) {
    for (auto * kv : caches()) {
        kv->seq_keep(seq_id);
    }
}

void llama_kv_cache_swaa::seq_add(llama_seq_id seq_id, llama_pos p0, llama_pos p1, llama_pos shift) {
    if (shift == 0) {
        return;
    }

    // note: what the caller decodes next is not where the sequence ends then, so it is refused
    if (!get_can_shift()) {
        LLAMA_LOG_ERROR("%s: ignored, positions of M-RoPE or of a ring cannot be shifted, see llama_memory_can_shift()\n", __func__);
        return;
    }

    if (is_prompt_end_in(seq_id, p0, p1)) {
        prompt_end[seq_id] = std::clamp<int64_t>((int64_t) prompt_end[seq_id] + shift, 0, std::numeric_limits<llama_pos>::max());
    }

    for (auto * kv : caches()) {
        kv->seq_add(seq_id, p0, p1, shift);
    }
}

void llama_kv_cache_swaa::seq_div(llama_seq_id seq_id, llama_pos p0, llama_pos p1, int d) {
    if (d == 1) {
        return;
    }

    if (!get_can_shift()) {
        LLAMA_LOG_ERROR("%s: ignored, positions of M-RoPE or of a ring cannot be divided, see llama_memory_can_shift()\n", __func__);
        return;
    }

    if (is_prompt_end_in(seq_id, p0, p1)) {
        prompt_end[seq_id] /= d;
    }

    for (auto * kv : caches()) {
        kv->seq_div(seq_id, p0, p1, d);
    }
}

bool llama_kv_cache_swaa::is_prompt_end_in(llama_seq_id seq_id, llama_pos p0, llama_pos p1) const {
    const llama_pos end = prompt_end[seq_id];

    // the end moves with the tokens that it bounds, and past the last token with the last token
    return end >= std::max(0, p0) && (p1 < 0 || end <= p1 || p1 > seq_pos_max(seq_id));
}

llama_pos llama_kv_cache_swaa::seq_pos_min(llama_seq_id seq_id) const {
    if (rings.empty()) {
        return kv_base->seq_pos_min(seq_id);
    }

    llama_pos res = -1;

    for (const auto & ring : rings) {
        llama_pos start = -1;

        const auto & seq_pos = ring.kv->get_cells(seq_id).seq_pos_get(seq_id);
        for (auto it = seq_pos.rbegin(); it != seq_pos.rend() && (start < 0 || it->first == start - 1); ++it) {
            start = it->first;
        }

        res = std::max(res, start);
    }

    return res;
}

llama_pos llama_kv_cache_swaa::seq_pos_max(llama_seq_id seq_id) const {
    return rings.empty() ? kv_base->seq_pos_max(seq_id) : rings[0].kv->seq_pos_max(seq_id);
}

std::map<ggml_backend_buffer_type_t, size_t> llama_kv_cache_swaa::memory_breakdown() const {
    std::map<ggml_backend_buffer_type_t, size_t> mb;
    for (const auto * kv : caches()) {
        for (const auto & [buft, size] : kv->memory_breakdown()) {
            mb[buft] += size;
        }
    }
    return mb;
}

bool llama_kv_cache_swaa::ring_check(const llama_batch_allocr & balloc) const {
    for (llama_seq_id s = 0; s < (llama_seq_id) n_seq_max; ++s) {
        const llama_pos pos = balloc.seq_pos_min(s);

        if (pos < 0) {
            continue;
        }

        for (const auto & ring : rings) {
            if (!ring.holds(s, pos)) {
                LLAMA_LOG_ERROR("%s: position %d of sequence %d sees sinks and a window of %d tokens that the ring does not hold, "
                        "evaluate the sequence again from its start\n", __func__, pos, s, ring.window);
                return false;
            }

            for (const auto * kv : caches()) {
                if (kv->seq_pos_max(s) != ring.kv->seq_pos_max(s)) {
                    LLAMA_LOG_ERROR("%s: sequence %d ends at position %d in one cache, but at %d in the ring, "
                            "evaluate the sequence again from its start\n", __func__, s, kv->seq_pos_max(s), ring.kv->seq_pos_max(s));
                    return false;
                }
            }
        }
    }

    return true;
}

std::vector<int32_t> llama_kv_cache_swaa::get_phases(const llama_batch & batch) const {
    std::vector<int32_t> n_tokens_seq(n_seq_max, 0);

    for (int32_t i = 0; i < batch.n_tokens; ++i) {
        for (int32_t s = 0; s < batch.n_seq_id[i]; ++s) {
            n_tokens_seq[batch.seq_id[i][s]]++;
        }
    }

    std::vector<int32_t> res(batch.n_tokens);

    for (int32_t i = 0; i < batch.n_tokens; ++i) {
        // a token that several sequences share is decoded or drafted only if it is for all of them
        bool decode  = true;
        bool drafted = true;

        for (int32_t s = 0; s < batch.n_seq_id[i]; ++s) {
            const llama_seq_id seq_id = batch.seq_id[i][s];

            decode = decode && (prompt_end[seq_id] < 0 ? n_tokens_seq[seq_id] == 1 : batch.pos[i] >= prompt_end[seq_id]);
            drafted = drafted && draft_start[seq_id] >= 0 && batch.pos[i] >= draft_start[seq_id];
        }

        res[i] = drafted ? LLAMA_SWAA_PHASE_DRAFT : decode ? LLAMA_SWAA_PHASE_DECODE : LLAMA_SWAA_PHASE_PREFILL;
    }

    return res;
}

bool llama_kv_cache_swaa::is_foreign(const llama_batch & batch) const {
    return has_mrope && batch.embd;
}

llama_memory_status llama_kv_cache_swaa::check_batch(const llama_batch_allocr & balloc) const {
    if (is_foreign(balloc.get_batch())) {
        LLAMA_LOG_ERROR("%s: a swaa schedule counts positions of text, and those of images are of another kind (M-RoPE)\n", __func__);
        return LLAMA_MEMORY_STATUS_FAILED_COMPUTE;
    }

    if (!rings.empty() && !ring_check(balloc)) {
        return LLAMA_MEMORY_STATUS_FAILED_COMPUTE;
    }

    // without a base cache nothing else limits the positions
    for (llama_seq_id s = 0; s < (llama_seq_id) n_seq_max; ++s) {
        if (balloc.seq_pos_max(s) >= (llama_pos) n_ctx && !kv_base) {
            LLAMA_LOG_ERROR("%s: position %d of sequence %d is past the context of %u tokens\n", __func__, balloc.seq_pos_max(s), s, n_ctx);
            return LLAMA_MEMORY_STATUS_FAILED_PREPARE;
        }
    }

    return LLAMA_MEMORY_STATUS_SUCCESS;
}

std::optional<llama_swaa_split> llama_kv_cache_swaa::split_batch(llama_batch_allocr & balloc, uint32_t n_ubatch, bool equal_seqs, bool embd_all) const {
    const auto phases = get_phases(balloc.get_batch());

    const bool is_multi = !unified && n_seq_max > 1;

    balloc.split_reset(phases);

    llama_swaa_split res;
    while (true) {
        auto ubatch =
            equal_seqs && embd_all ? balloc.split_seq(n_ubatch) :
            equal_seqs || is_multi ? balloc.split_equal(n_ubatch, is_multi, 0) :
                                     balloc.split_simple(n_ubatch);

        if (ubatch.n_tokens == 0) {
            break;
        }

        res.phases.push_back((llama_swaa_phase) phases[ubatch.data->batch_idxs[0]]);
        res.ubatches.push_back(std::move(ubatch)); // NOLINT
    }

    if (balloc.get_n_used() < balloc.get_n_tokens()) {
        // failed to find a suitable split
        return {};
    }

    return res;
}

llama_memory_context_ptr llama_kv_cache_swaa::init_split(llama_swaa_split split) {
    do {
        slot_info_vec_t sinfos_base;
        if (kv_base) {
            sinfos_base = kv_base->prepare(split.ubatches);
            if (sinfos_base.empty()) {
                break;
            }
        }

        slot_info_vec_t sinfos_ring;
        if (kv_ring) {
            sinfos_ring = kv_ring->prepare(split.ubatches);
            if (sinfos_ring.empty()) {
                break;
            }
        }

        slot_info_vec_t sinfos_own;
        if (kv_own) {
            sinfos_own = kv_own->prepare(split.ubatches);
            if (sinfos_own.empty()) {
                break;
            }
        }

        return std::make_unique<llama_kv_cache_swaa_context>(
                this, std::move(sinfos_base), std::move(sinfos_ring), std::move(sinfos_own), std::move(split));
    } while (false);

    return std::make_unique<llama_kv_cache_swaa_context>(LLAMA_MEMORY_STATUS_FAILED_PREPARE);
}

llama_memory_context_ptr llama_kv_cache_swaa::init_batch(llama_batch_allocr & balloc, uint32_t n_ubatch, bool embd_all) {
    const auto status = check_batch(balloc);
    if (status != LLAMA_MEMORY_STATUS_SUCCESS) {
        return std::make_unique<llama_kv_cache_swaa_context>(status);
    }

    auto split = split_batch(balloc, n_ubatch, false, embd_all);
    if (!split) {
        return std::make_unique<llama_kv_cache_swaa_context>(LLAMA_MEMORY_STATUS_FAILED_PREPARE);
    }

    return init_split(std::move(*split));
}

llama_memory_context_ptr llama_kv_cache_swaa::init_full() {
    return std::make_unique<llama_kv_cache_swaa_context>(this, LLAMA_SWAA_FORM_WINDOW);
}

std::vector<llama_memory_context_ptr> llama_kv_cache_swaa::init_full_forms() {
    std::vector<llama_memory_context_ptr> res;
    for (const auto form : { LLAMA_SWAA_FORM_FULL, LLAMA_SWAA_FORM_FULL_MADE, LLAMA_SWAA_FORM_WINDOW_HOST }) {
        res.push_back(std::make_unique<llama_kv_cache_swaa_context>(this, form));
    }
    return res;
}

llama_memory_context_ptr llama_kv_cache_swaa::init_update(llama_context * lctx, bool optimize) {
    return std::make_unique<llama_kv_cache_swaa_context>(this, lctx, optimize);
}

bool llama_kv_cache_swaa::get_can_shift() const {
    return !kv_ring && kv_base->get_can_shift() && (!kv_own || (kv_own->get_can_shift() && kv_own->get_size() == kv_base->get_size()));
}

bool llama_kv_cache_swaa::get_can_non_causal() const {
    return false;
}

bool llama_kv_cache_swaa::get_can_train() const {
    return false;
}

uint32_t llama_kv_cache_swaa::get_n_nodes_extra(uint32_t n_tokens) const {
    return llm_graph_input_attn_swaa::n_nodes(schedule.modes.size(), n_tokens);
}

void llama_kv_cache_swaa::state_write(llama_io_write_i & io, llama_seq_id seq_id, llama_state_seq_flags flags) const {
    // without a schedule, a state is that of any other KV cache
    if (schedule.any()) {
        schedule.state_write(io);
    }

    // a partial state leaves out what does not depend on the position that it is taken at, which is the base next to a ring
    const bool partial = !rings.empty() && (flags & LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY);

    for (const auto * kv : caches()) {
        if (kv != kv_base.get() || !partial) {
            kv->state_write(io, seq_id, flags);
        }
    }
}

void llama_kv_cache_swaa::state_read(llama_io_read_i & io, llama_seq_id seq_id, llama_state_seq_flags flags) {
    if (schedule.any()) {
        schedule.state_check(io);
    }

    const bool partial = !rings.empty() && (flags & LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY);

    try {
        for (auto * kv : caches()) {
            if (kv != kv_base.get() || !partial) {
                kv->state_read(io, seq_id, flags);
            }
        }
    } catch (...) {
        if (!rings.empty() && seq_id == -1) {
            LLAMA_LOG_ERROR("%s: the ring has %u cells, and a whole state needs those that it was saved from (see n_ubatch and n_seq_max)\n",
                    __func__, rings[0].kv->get_size());
        }

        // all or none
        state_clear(seq_id);
        throw;
    }
}

void llama_kv_cache_swaa::state_clear(llama_seq_id seq_id) {
    for (auto * kv : caches()) {
        kv->state_clear(seq_id);
    }
}

const llama_swaa_schedule & llama_kv_cache_swaa::get_schedule() const {
    return schedule;
}

llama_kv_cache * llama_kv_cache_swaa::get_base() const {
    return kv_base.get();
}

llama_kv_cache * llama_kv_cache_swaa::get_ring() const {
    return kv_ring.get();
}

llama_kv_cache * llama_kv_cache_swaa::get_own() const {
    return kv_own.get();
}

void llama_kv_cache_swaa::set_prompt_end(llama_seq_id seq_id, llama_pos pos) {
    if (seq_id < 0 || seq_id >= (llama_seq_id) n_seq_max) {
        LLAMA_LOG_ERROR("%s: seq_id = %d, but the context has %u sequences\n", __func__, seq_id, n_seq_max);
        return;
    }

    prompt_end[seq_id] = pos < 0 ? -1 : pos;
}

bool llama_kv_cache_swaa::set_draft_start(llama_seq_id seq_id, llama_pos pos) {
    if (draft.window == 0) {
        LLAMA_LOG_ERROR("%s: the context does not draft, see llama_model_swaa_set_draft()\n", __func__);
        return false;
    }

    if (seq_id < 0 || seq_id >= (llama_seq_id) n_seq_max) {
        LLAMA_LOG_ERROR("%s: seq_id = %d, but the context has %u sequences\n", __func__, seq_id, n_seq_max);
        return false;
    }

    draft_start[seq_id] = pos < 0 ? -1 : pos;

    return true;
}

const llama_swaa_schedule & llama_kv_cache_swaa::get_view(llama_swaa_phase phase) const {
    return phase == LLAMA_SWAA_PHASE_DRAFT ? draft : schedule;
}

const llama_swaa_schedule & llama_kv_cache_swaa::get_view_own() const {
    return own;
}

bool llama_kv_cache_swaa::is_hiding(const llama_ubatch & ubatch, llama_swaa_phase phase) const {
    const auto & view = get_view(phase);

    const int64_t n_seen = (int64_t) view.n_sink + view.window;

    return std::any_of(ubatch.pos, ubatch.pos + ubatch.n_tokens, [&](llama_pos pos) { return pos >= n_seen; });
}

bool llama_kv_cache_swaa::can_make_mask() const {
    return make_mask;
}

bool llama_kv_cache_swaa::can_gather() const {
    return !v_trans;
}

bool llama_kv_cache_swaa::can_skip(const llama_ubatch & ubatch) const {
    return on_cpu && !v_trans && ubatch.n_tokens/llama_swaa_n_stream(*kv_base, ubatch) <= LLAMA_SWAA_N_SKIP;
}

uint32_t llama_kv_cache_swaa::n_gather(uint32_t n_seen, uint32_t n_kv) const {
    const uint32_t res = GGML_PAD(n_seen, LLAMA_SWAA_N_PAD);

    return res < n_kv ? res : 0;
}

uint32_t llama_kv_cache_swaa::n_seen_max(const llama_kv_cache & kv_cur, const llama_swaa_schedule & view, uint32_t n_tokens) const {
    const uint64_t n_seen = (uint64_t) view.n_sink + view.window - 1;

    return std::min<uint64_t>(kv_cur.get_size(), n_seen*(unified ? n_seq_max : 1) + n_tokens);
}

//
// llama_kv_cache_swaa_context
//

llama_kv_cache_swaa_context::llama_kv_cache_swaa_context(llama_memory_status status) : status(status) {}

llama_kv_cache_swaa_context::llama_kv_cache_swaa_context(
        llama_kv_cache_swaa * kv,
        llama_swaa_form form) : kv(kv), form(form), status(LLAMA_MEMORY_STATUS_SUCCESS) {
    init([](llama_kv_cache * kv_cur) { return kv_cur->init_full(); });
}

llama_kv_cache_swaa_context::llama_kv_cache_swaa_context(
        llama_kv_cache_swaa * kv,
        llama_context * lctx,
        bool optimize) : kv(kv), status(LLAMA_MEMORY_STATUS_NO_UPDATE) {
    init([&](llama_kv_cache * kv_cur) { return kv_cur->init_update(lctx, optimize); });
}

llama_kv_cache_swaa_context::llama_kv_cache_swaa_context(
        llama_kv_cache_swaa * kv,
        slot_info_vec_t sinfos_base,
        slot_info_vec_t sinfos_ring,
        slot_info_vec_t sinfos_own,
        llama_swaa_split split) :
    kv(kv), ubatches(std::move(split.ubatches)), phases(std::move(split.phases)), status(LLAMA_MEMORY_STATUS_SUCCESS) {
    // note: here we copy the ubatches, as llama_kv_cache_iswa_context does
    init([&](llama_kv_cache * kv_cur) {
        auto & sinfos = kv_cur == kv->get_base() ? sinfos_base : kv_cur == kv->get_ring() ? sinfos_ring : sinfos_own;

        return std::make_unique<llama_kv_cache_context>(kv_cur, std::move(sinfos), this->ubatches);
    });
}

llama_kv_cache_swaa_context::~llama_kv_cache_swaa_context() = default;

template<typename F>
void llama_kv_cache_swaa_context::init(F f) {
    const auto one = [&](llama_memory_context_ptr & ctx, llama_kv_cache * kv_cur) {
        if (kv_cur) {
            ctx = f(kv_cur);
            status = llama_memory_status_combine(status, ctx->get_status());
        }
    };

    one(ctx_base, kv->get_base());
    one(ctx_ring, kv->get_ring());
    one(ctx_own,  kv->get_own());
}

std::vector<llama_memory_context_i *> llama_kv_cache_swaa_context::contexts() const {
    std::vector<llama_memory_context_i *> res;
    for (auto * ctx : { ctx_base.get(), ctx_ring.get(), ctx_own.get() }) {
        if (ctx) {
            res.push_back(ctx);
        }
    }
    return res;
}

bool llama_kv_cache_swaa_context::next() {
    assert(status == LLAMA_MEMORY_STATUS_SUCCESS);

    for (auto * ctx : contexts()) {
        ctx->next();
    }

    return ++i_next < ubatches.size();
}

bool llama_kv_cache_swaa_context::apply() {
    assert(!llama_memory_status_is_fail(status));

    bool res = true;

    // an update may be due in one of the caches only
    for (auto * ctx : contexts()) {
        if (ctx->get_status() != LLAMA_MEMORY_STATUS_NO_UPDATE) {
            res = res & ctx->apply();
        }
    }

    win_base.reset();
    win_ring.reset();
    win_own .reset();

    if (!ubatches.empty() && is_windowed()) {
        win_base = std::make_unique<llama_swaa_window>(*kv->get_base(), kv->get_view(get_phase()), ubatches[i_next]);
    }
    if (!ubatches.empty() && get_phase() == LLAMA_SWAA_PHASE_PREFILL && kv->can_gather()) {
        if (ctx_ring) {
            win_ring = std::make_unique<llama_swaa_window>(*kv->get_ring(), get_schedule(), ubatches[i_next]);
        }
        if (ctx_own) {
            win_own = std::make_unique<llama_swaa_window>(*kv->get_own(), kv->get_view_own(), ubatches[i_next]);
        }
    }

    return res;
}

llama_memory_status llama_kv_cache_swaa_context::get_status() const {
    return status;
}

const llama_ubatch & llama_kv_cache_swaa_context::get_ubatch() const {
    assert(status == LLAMA_MEMORY_STATUS_SUCCESS);

    return ubatches[i_next];
}

std::unique_ptr<llm_graph_input_attn_kv> llama_kv_cache_swaa_context::build_attn_inp_kv(
                ggml_context * ctx,
          const llama_ubatch & ubatch,
         const llama_hparams & hparams,
         const llama_cparams & cparams) const {
    return std::make_unique<llm_graph_input_attn_swaa>(ctx, ubatch, hparams, cparams, this);
}

std::unique_ptr<llm_graph_input_attn_kv_iswa> llama_kv_cache_swaa_context::build_attn_inp_kv_iswa(
                ggml_context * ctx,
          const llama_ubatch & ubatch,
         const llama_hparams & hparams,
         const llama_cparams & cparams) const {
    return std::make_unique<llm_graph_input_attn_swaa_iswa>(ctx, ubatch, hparams, cparams, this);
}

const llama_swaa_schedule & llama_kv_cache_swaa_context::get_schedule() const {
    return kv->get_schedule();
}

const llama_kv_cache_context * llama_kv_cache_swaa_context::get_base() const {
    return static_cast<const llama_kv_cache_context *>(ctx_base.get());
}

const llama_kv_cache_context * llama_kv_cache_swaa_context::get_ring() const {
    return static_cast<const llama_kv_cache_context *>(ctx_ring.get());
}

const llama_kv_cache_context * llama_kv_cache_swaa_context::get_own() const {
    return static_cast<const llama_kv_cache_context *>(ctx_own.get());
}

bool llama_kv_cache_swaa_context::has_graph_aside() const {
    return get_phase() == LLAMA_SWAA_PHASE_DRAFT && get_ubatch().n_tokens <= 8;
}

llama_swaa_phase llama_kv_cache_swaa_context::get_phase() const {
    if (ubatches.empty()) {
        return form == LLAMA_SWAA_FORM_WINDOW || form == LLAMA_SWAA_FORM_WINDOW_HOST ? LLAMA_SWAA_PHASE_PREFILL : LLAMA_SWAA_PHASE_DECODE;
    }

    return phases[i_next];
}

bool llama_kv_cache_swaa_context::is_windowed(llama_swaa_mode mode) const {
    const auto phase = get_phase();

    const bool has_window = phase == LLAMA_SWAA_PHASE_DRAFT ? mode != LLAMA_SWAA_MODE_ALWAYS :
        phase == LLAMA_SWAA_PHASE_PREFILL && mode == LLAMA_SWAA_MODE_PREFILL;

    return has_window && kv->has_layers(mode) && (ubatches.empty() || kv->is_hiding(ubatches[i_next], phase));
}

bool llama_kv_cache_swaa_context::is_windowed() const {
    return is_windowed(LLAMA_SWAA_MODE_FULL) || is_windowed(LLAMA_SWAA_MODE_PREFILL);
}

uint32_t llama_kv_cache_swaa_context::get_n_gather(
        const llama_kv_cache & kv_cur,
        const llama_swaa_schedule & view,
        const llama_swaa_window * win,
        const llama_ubatch & ubatch,
        uint32_t n_kv) const {
    if (!kv->can_gather()) {
        return 0;
    }

    if (win) {
        return kv->n_gather(win->size(), n_kv);
    }

    // to reserve: the widest gather of any ubatch, which the largest ubatch may be too large for
    const uint32_t n_widest = (n_kv - 1)/LLAMA_SWAA_N_PAD*LLAMA_SWAA_N_PAD;

    const auto n_gather = [&](uint32_t n_tokens) {
        return kv->n_gather(std::min(kv->n_seen_max(kv_cur, view, n_tokens), n_widest), n_kv);
    };

    // a smaller one may have more blocks: the most cells of any ubatch, shared out between the blocks of this one
    const uint32_t n_stream = llama_swaa_n_stream(kv_cur, ubatch);
    const uint32_t n_blocks = n_stream*llama_swaa_window::n_block(ubatch.n_tokens/n_stream);

    uint32_t n_cells = 0;
    for (uint32_t s = 1; s <= n_stream; ++s) {
        for (uint32_t n_tps = 1; n_tps <= ubatch.n_tokens/s; ++n_tps) {
            const uint32_t n_block = llama_swaa_window::n_block(n_tps);

            n_cells = std::max(n_cells, s*n_block*n_gather(n_tps/n_block));
        }
    }

    return std::max<uint32_t>(n_gather(ubatch.n_tokens), GGML_PAD((n_cells + n_blocks - 1)/n_blocks, LLAMA_SWAA_N_PAD));
}

uint32_t llama_kv_cache_swaa_context::get_n_gather_base(const llama_ubatch & ubatch) const {
    if (!is_windowed() || (get_phase() == LLAMA_SWAA_PHASE_DRAFT && kv->can_skip(ubatch))) {
        return 0;
    }

    return get_n_gather(*kv->get_base(), get_schedule(), win_base.get(), ubatch, get_base()->get_n_kv());
}

uint32_t llama_kv_cache_swaa_context::get_n_gather_ring(const llama_ubatch & ubatch) const {
    return get_phase() == LLAMA_SWAA_PHASE_PREFILL ? get_n_gather(*kv->get_ring(), get_schedule(), win_ring.get(), ubatch, get_ring()->get_n_kv()) : 0;
}

uint32_t llama_kv_cache_swaa_context::get_n_gather_own(const llama_ubatch & ubatch) const {
    return get_phase() == LLAMA_SWAA_PHASE_PREFILL ? get_n_gather(*kv->get_own(), kv->get_view_own(), win_own.get(), ubatch, get_own()->get_n_kv()) : 0;
}

uint32_t llama_kv_cache_swaa_context::get_n_tail(const llama_ubatch & ubatch) const {
    if (!kv->can_make_mask()) {
        return 0;
    }

    const uint32_t n_stream = llama_swaa_n_stream(*kv->get_base(), ubatch);
    const uint32_t n_kv     = get_base()->get_n_kv();

    const uint32_t res = llama_swaa_n_tail(ubatch.n_tokens/n_stream, n_kv);

    const bool ok = ubatches.empty() ?
        form == LLAMA_SWAA_FORM_WINDOW || form == LLAMA_SWAA_FORM_FULL_MADE :
        res > 0 && llama_swaa_can_share(*kv->get_base(), ubatch, n_kv, res);

    return ok ? res : 0;
}

const llama_swaa_window & llama_kv_cache_swaa_context::get_win_base() const {
    return *win_base;
}

const llama_swaa_window & llama_kv_cache_swaa_context::get_win_ring() const {
    return *win_ring;
}

const llama_swaa_window & llama_kv_cache_swaa_context::get_win_own() const {
    return *win_own;
}

llama_kv_cache_swaa * llama_kv_cache_swaa_context::get_kv() const {
    return kv;
}

bool llama_swaa_is_memory(llama_memory_t memory) {
    return dynamic_cast<llama_kv_cache_swaa *>(memory) != nullptr;
}

//
// interface implementation
//

static llama_kv_cache_swaa * llama_swaa_get_kv(const llama_context * ctx) {
    auto * memory = llama_get_memory(ctx);

    if (auto * hybrid = dynamic_cast<llama_memory_hybrid_swaa *>(memory)) {
        return hybrid->get_mem_attn();
    }

    return dynamic_cast<llama_kv_cache_swaa *>(memory);
}

void llama_swaa_set_prompt_end(llama_context * ctx, llama_seq_id seq_id, llama_pos pos) {
    auto * kv = llama_swaa_get_kv(ctx);

    // without a schedule the phases have no meaning
    if (kv) {
        kv->set_prompt_end(seq_id, pos);
    }
}

bool llama_swaa_set_draft_start(llama_context * ctx, llama_seq_id seq_id, llama_pos pos) {
    auto * kv = llama_swaa_get_kv(ctx);

    return kv && kv->set_draft_start(seq_id, pos);
}

bool llama_swaa_has_ring(const llama_context * ctx) {
    const auto * kv = llama_swaa_get_kv(ctx);

    return kv && kv->has_ring();
}

size_t llama_swaa_kv_bytes(const llama_context * ctx) {
    size_t res = 0;

    if (const auto * memory = llama_get_memory(ctx)) {
        for (const auto & [_, size] : memory->memory_breakdown()) {
            res += size;
        }
    }

    return res;
}
