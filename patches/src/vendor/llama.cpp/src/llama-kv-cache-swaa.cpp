// The KV cache of a model with a schedule: its two caches, the phases of the tokens, and what the ring still holds
//
// Relies on, of llama.cpp:
//   - llama_kv_cache with n_sink >= 0, which is a ring (patch "a KV cache that is a ring with sinks"): which cells it
//     overwrites, that prepare() undoes what it tries, and that a state of one sequence has its sinks
//   - llama_kv_cells::seq_pos_get(), the positions of a sequence in order
//   - llama_batch_allocr::split_reset() with groups (patch "split a batch between groups of tokens"), and
//     llama_ubatch::data->batch_idxs, a token's place in the batch
//   - llama_memory_i::init_full_forms() and get_n_nodes_extra() (patch "reserve a graph of each form that a memory has")
//   - llama_kv_cache_iswa and its context, which hold two caches in the same manner: what changes there may have to here

#include "llama-kv-cache-swaa.h"

#include "llama-batch.h"
#include "llama-context.h"
#include "llama-graph-swaa.h"
#include "llama-impl.h"
#include "llama-io.h"
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

llama_kv_cache_swaa::llama_kv_cache_swaa(
        const llama_model & model,
                ggml_type   type_k,
                ggml_type   type_v,
      const llama_cparams & cparams) :
    schedule(llama_swaa_get_schedule(model)), draft(llama_swaa_get_draft(model)), n_ctx(cparams.n_ctx_seq), n_seq_max(cparams.n_seq_max), unified(cparams.kv_unified),
    v_trans(!cparams.flash_attn), make_mask(llama_swaa_can_make_mask(model)), on_cpu(llama_swaa_is_on_cpu(model)), prompt_end(LLAMA_MAX_SEQ, -1), draft_start(LLAMA_MAX_SEQ, -1) {
    if (!cparams.causal_attn) {
        throw std::runtime_error("a swaa schedule needs causal attention");
    }

    LLAMA_LOG_INFO("%s: %s\n", __func__, schedule.str().c_str());
    if (draft.window > 0) {
        LLAMA_LOG_INFO("%s: drafts see a window of %u tokens and %u sinks\n", __func__, draft.window, draft.n_sink);
    }

    const auto is_ring = [&](int32_t il) { return schedule.mode(il) == LLAMA_SWAA_MODE_ALWAYS; };
    const auto is_base = [&](int32_t il) { return !is_ring(il); };

    if (schedule.has(LLAMA_SWAA_MODE_FULL) || schedule.has(LLAMA_SWAA_MODE_PREFILL)) {
        LLAMA_LOG_INFO("%s: creating base KV cache, size = %u cells\n", __func__, n_ctx);

        kv_base = std::make_unique<llama_kv_cache>(
                model, model.hparams, type_k, type_v,
                v_trans, cparams.offload_kqv, unified, n_ctx, n_seq_max, 1,
                0, LLAMA_SWA_TYPE_NONE, nullptr, is_base, nullptr, nullptr);
    }

    if (schedule.has(LLAMA_SWAA_MODE_ALWAYS)) {
        const uint64_t n_keep = ((uint64_t) schedule.n_sink + schedule.window)*(unified ? n_seq_max : 1);

        const uint32_t n_need = std::min<uint64_t>(n_ctx, n_keep + cparams.n_ubatch);
        const uint32_t n_ring = std::min<uint32_t>(n_ctx, GGML_PAD(n_need, LLAMA_SWAA_N_PAD));

        LLAMA_LOG_INFO("%s: creating ring KV cache, size = %u cells, its positions cannot be shifted\n", __func__, n_ring);

        kv_ring = std::make_unique<llama_kv_cache>(
                model, model.hparams, type_k, type_v,
                v_trans, cparams.offload_kqv, unified, n_ring, n_seq_max, 1,
                schedule.window, LLAMA_SWA_TYPE_STANDARD, nullptr, is_ring, nullptr, nullptr, "", (int32_t) schedule.n_sink);
    }
}

void llama_kv_cache_swaa::clear(bool data) {
    if (kv_base) {
        kv_base->clear(data);
    }
    if (kv_ring) {
        kv_ring->clear(data);
    }
}

bool llama_kv_cache_swaa::ring_holds(llama_seq_id seq_id, llama_pos pos) const {
    const auto & seq_pos = kv_ring->get_cells(seq_id).seq_pos_get(seq_id);

    const auto holds = [&](llama_pos p0, llama_pos p1) {
        auto it = seq_pos.lower_bound({ p0, 0 });
        for (llama_pos p = p0; p < p1; ++p, ++it) {
            if (it == seq_pos.end() || it->first != p) {
                return false;
            }
        }
        return true;
    };

    // the position before is needed also with a window of 1, it tells where the sequence goes on
    const llama_pos n_sink = schedule.n_sink;
    const llama_pos window = std::max(schedule.window, 2u);

    return holds(0, std::min(n_sink, pos)) && holds(std::max(0, pos - window + 1), pos);
}

bool llama_kv_cache_swaa::seq_rm(llama_seq_id seq_id, llama_pos p0, llama_pos p1) {
    p0 = std::max(0, p0);
    p1 = p1 < 0 ? std::numeric_limits<llama_pos>::max() : p1;

    // with one stream, more sequences can be held than decoded
    const llama_seq_id n_seq = kv_ring && kv_ring->get_n_stream() == 1 ? LLAMA_MAX_SEQ : n_seq_max;

    for (llama_seq_id s = 0; kv_ring && s < n_seq; ++s) {
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

        // what is left has to hold what the next token can see, which a hole in it never does
        const bool ok = is_tail ? ring_holds(s, p0) :
            p0 >= (llama_pos) schedule.n_sink && p1 <= std::min<int64_t>(pos_max, pos_next - schedule.window + 1);

        if (!ok) {
            LLAMA_LOG_DEBUG("%s: the ring does not hold what position %lld of sequence %d would see\n", __func__, (long long) pos_next, s);
            return false;
        }
    }

    // the end of a prompt that falls into a hole is where the hole begins
    for (llama_seq_id s = 0; s < LLAMA_MAX_SEQ; ++s) {
        if ((seq_id < 0 || s == seq_id) && prompt_end[s] > p0 && prompt_end[s] < p1 && p1 <= seq_pos_max(s)) {
            prompt_end[s] = p0;
        }
    }

    bool res = true;

    if (kv_base) {
        res = res & kv_base->seq_rm(seq_id, p0, p1);
    }
    if (kv_ring) {
        res = res & kv_ring->seq_rm(seq_id, p0, p1);
    }

    return res;
}

void llama_kv_cache_swaa::seq_cp(llama_seq_id seq_id_src, llama_seq_id seq_id_dst, llama_pos p0, llama_pos p1) {
    if (kv_ring) {
        const bool is_whole = p0 <= 0 && (p1 < 0 || p1 > seq_pos_max(seq_id_src));

        if (!is_whole && kv_ring->get_stream(seq_id_src) != kv_ring->get_stream(seq_id_dst)) {
            LLAMA_LOG_ERROR("%s: only whole sequences are copied between streams, nothing is copied\n", __func__);
            return;
        }
        if (!is_whole && p1 >= 0 && !ring_holds(seq_id_src, p1)) {
            LLAMA_LOG_ERROR("%s: the ring does not hold what position %d of sequence %d would see, nothing is copied\n", __func__, p1, seq_id_src);
            return;
        }
    }

    if (kv_base) {
        kv_base->seq_cp(seq_id_src, seq_id_dst, p0, p1);
    }
    if (kv_ring) {
        kv_ring->seq_cp(seq_id_src, seq_id_dst, p0, p1);
    }

    prompt_end[seq_id_dst] = prompt_end[seq_id_src];
}

void llama_kv_cache_swaa::seq_keep(llama_seq_id seq_id) {
    if (kv_base) {
        kv_base->seq_keep(seq_id);
    }
    if (kv_ring) {
        kv_ring->seq_keep(seq_id);
    }
}

void llama_kv_cache_swaa::seq_add(llama_seq_id seq_id, llama_pos p0, llama_pos p1, llama_pos shift) {
    if (shift == 0) {
        return;
    }

    // note: what the caller decodes next is not where the sequence ends then, so it is refused
    if (!get_can_shift()) {
        LLAMA_LOG_ERROR("%s: ignored, the positions of always windowed layers cannot be shifted, see llama_memory_can_shift()\n", __func__);
        return;
    }

    if (is_prompt_end_in(seq_id, p0, p1)) {
        prompt_end[seq_id] = std::clamp<int64_t>((int64_t) prompt_end[seq_id] + shift, 0, std::numeric_limits<llama_pos>::max());
    }

    kv_base->seq_add(seq_id, p0, p1, shift);
}

void llama_kv_cache_swaa::seq_div(llama_seq_id seq_id, llama_pos p0, llama_pos p1, int d) {
    if (d == 1) {
        return;
    }

    if (!get_can_shift()) {
        LLAMA_LOG_ERROR("%s: ignored, the positions of always windowed layers cannot be divided, see llama_memory_can_shift()\n", __func__);
        return;
    }

    if (is_prompt_end_in(seq_id, p0, p1)) {
        prompt_end[seq_id] /= d;
    }

    kv_base->seq_div(seq_id, p0, p1, d);
}

bool llama_kv_cache_swaa::is_prompt_end_in(llama_seq_id seq_id, llama_pos p0, llama_pos p1) const {
    const llama_pos end = prompt_end[seq_id];

    // the end moves with the tokens that it bounds, and past the last token with the last token
    return end >= std::max(0, p0) && (p1 < 0 || end <= p1 || p1 > seq_pos_max(seq_id));
}

llama_pos llama_kv_cache_swaa::seq_pos_min(llama_seq_id seq_id) const {
    if (!kv_ring) {
        return kv_base->seq_pos_min(seq_id);
    }

    llama_pos res = -1;

    const auto & seq_pos = kv_ring->get_cells(seq_id).seq_pos_get(seq_id);
    for (auto it = seq_pos.rbegin(); it != seq_pos.rend() && (res < 0 || it->first == res - 1); ++it) {
        res = it->first;
    }

    return res;
}

llama_pos llama_kv_cache_swaa::seq_pos_max(llama_seq_id seq_id) const {
    return kv_ring ? kv_ring->seq_pos_max(seq_id) : kv_base->seq_pos_max(seq_id);
}

std::map<ggml_backend_buffer_type_t, size_t> llama_kv_cache_swaa::memory_breakdown() const {
    std::map<ggml_backend_buffer_type_t, size_t> mb;
    for (const auto * kv : { kv_base.get(), kv_ring.get() }) {
        if (!kv) {
            continue;
        }
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

        if (!ring_holds(s, pos)) {
            LLAMA_LOG_ERROR("%s: position %d of sequence %d sees sinks and a window of %u tokens that the ring does not hold, "
                    "evaluate the sequence again from its start\n", __func__, pos, s, schedule.window);
            return false;
        }

        if (kv_base && kv_base->seq_pos_max(s) != kv_ring->seq_pos_max(s)) {
            LLAMA_LOG_ERROR("%s: sequence %d ends at position %d in the base cache, but at %d in the ring, "
                    "evaluate the sequence again from its start\n", __func__, s, kv_base->seq_pos_max(s), kv_ring->seq_pos_max(s));
            return false;
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

llama_memory_context_ptr llama_kv_cache_swaa::init_batch(llama_batch_allocr & balloc, uint32_t n_ubatch, bool embd_all) {
    GGML_UNUSED(embd_all);

    if (kv_ring && !ring_check(balloc)) {
        return std::make_unique<llama_kv_cache_swaa_context>(LLAMA_MEMORY_STATUS_FAILED_COMPUTE);
    }

    // without a base cache nothing else limits the positions
    for (llama_seq_id s = 0; s < (llama_seq_id) n_seq_max; ++s) {
        if (balloc.seq_pos_max(s) >= (llama_pos) n_ctx && !kv_base) {
            LLAMA_LOG_ERROR("%s: position %d of sequence %d is past the context of %u tokens\n", __func__, balloc.seq_pos_max(s), s, n_ctx);
            return std::make_unique<llama_kv_cache_swaa_context>(LLAMA_MEMORY_STATUS_FAILED_PREPARE);
        }
    }

    const auto phases = get_phases(balloc.get_batch());

    const bool is_multi = !unified && n_seq_max > 1;

    do {
        balloc.split_reset(phases);

        std::vector<llama_ubatch>     ubatches;
        std::vector<llama_swaa_phase> phases_ubatch;
        while (true) {
            auto ubatch = is_multi ? balloc.split_equal(n_ubatch, true, 0) : balloc.split_simple(n_ubatch);

            if (ubatch.n_tokens == 0) {
                break;
            }

            phases_ubatch.push_back((llama_swaa_phase) phases[ubatch.data->batch_idxs[0]]);
            ubatches.push_back(std::move(ubatch)); // NOLINT
        }

        if (balloc.get_n_used() < balloc.get_n_tokens()) {
            // failed to find a suitable split
            break;
        }

        slot_info_vec_t sinfos_base;
        if (kv_base) {
            sinfos_base = kv_base->prepare(ubatches);
            if (sinfos_base.empty()) {
                break;
            }
        }

        slot_info_vec_t sinfos_ring;
        if (kv_ring) {
            sinfos_ring = kv_ring->prepare(ubatches);
            if (sinfos_ring.empty()) {
                break;
            }
        }

        return std::make_unique<llama_kv_cache_swaa_context>(
                this, std::move(sinfos_base), std::move(sinfos_ring), std::move(ubatches), std::move(phases_ubatch));
    } while (false);

    return std::make_unique<llama_kv_cache_swaa_context>(LLAMA_MEMORY_STATUS_FAILED_PREPARE);
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
    return !kv_ring && kv_base->get_can_shift();
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
    const bool partial = kv_ring && (flags & LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY);

    if (kv_base && !partial) {
        kv_base->state_write(io, seq_id, flags);
    }
    if (kv_ring) {
        kv_ring->state_write(io, seq_id, flags);
    }
}

void llama_kv_cache_swaa::state_read(llama_io_read_i & io, llama_seq_id seq_id, llama_state_seq_flags flags) {
    if (schedule.any()) {
        schedule.state_check(io);
    }

    const bool partial = kv_ring && (flags & LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY);

    try {
        if (kv_base && !partial) {
            kv_base->state_read(io, seq_id, flags);
        }
        if (kv_ring) {
            kv_ring->state_read(io, seq_id, flags);
        }
    } catch (...) {
        if (kv_ring && seq_id == -1) {
            LLAMA_LOG_ERROR("%s: the ring has %u cells, and a whole state needs those that it was saved from (see n_ubatch and n_seq_max)\n",
                    __func__, kv_ring->get_size());
        }

        // both or none
        if (kv_base) {
            kv_base->state_clear(seq_id);
        }
        if (kv_ring) {
            kv_ring->state_clear(seq_id);
        }
        throw;
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

uint32_t llama_kv_cache_swaa::n_seen_max(const llama_kv_cache & kv_cur, uint32_t n_tokens) const {
    const uint64_t n_seen = (uint64_t) schedule.n_sink + schedule.window - 1;

    return std::min<uint64_t>(kv_cur.get_size(), n_seen*(unified ? n_seq_max : 1) + n_tokens);
}

//
// llama_kv_cache_swaa_context
//

llama_kv_cache_swaa_context::llama_kv_cache_swaa_context(llama_memory_status status) : status(status) {}

llama_kv_cache_swaa_context::llama_kv_cache_swaa_context(
        llama_kv_cache_swaa * kv,
        llama_swaa_form form) : kv(kv), form(form), status(LLAMA_MEMORY_STATUS_SUCCESS) {
    if (kv->get_base()) {
        ctx_base = kv->get_base()->init_full();
        status = llama_memory_status_combine(status, ctx_base->get_status());
    }
    if (kv->get_ring()) {
        ctx_ring = kv->get_ring()->init_full();
        status = llama_memory_status_combine(status, ctx_ring->get_status());
    }
}

llama_kv_cache_swaa_context::llama_kv_cache_swaa_context(
        llama_kv_cache_swaa * kv,
        llama_context * lctx,
        bool optimize) : kv(kv), status(LLAMA_MEMORY_STATUS_NO_UPDATE) {
    if (kv->get_base()) {
        ctx_base = kv->get_base()->init_update(lctx, optimize);
        status = llama_memory_status_combine(status, ctx_base->get_status());
    }
    if (kv->get_ring()) {
        ctx_ring = kv->get_ring()->init_update(lctx, optimize);
        status = llama_memory_status_combine(status, ctx_ring->get_status());
    }
}

llama_kv_cache_swaa_context::llama_kv_cache_swaa_context(
        llama_kv_cache_swaa * kv,
        slot_info_vec_t sinfos_base,
        slot_info_vec_t sinfos_ring,
        std::vector<llama_ubatch> ubatches,
        std::vector<llama_swaa_phase> phases) :
    kv(kv), ubatches(std::move(ubatches)), phases(std::move(phases)), status(LLAMA_MEMORY_STATUS_SUCCESS) {
    // note: here we copy the ubatches, as llama_kv_cache_iswa_context does
    if (kv->get_base()) {
        ctx_base = std::make_unique<llama_kv_cache_context>(kv->get_base(), std::move(sinfos_base), this->ubatches);
        status = llama_memory_status_combine(status, ctx_base->get_status());
    }
    if (kv->get_ring()) {
        ctx_ring = std::make_unique<llama_kv_cache_context>(kv->get_ring(), std::move(sinfos_ring), this->ubatches);
        status = llama_memory_status_combine(status, ctx_ring->get_status());
    }
}

llama_kv_cache_swaa_context::~llama_kv_cache_swaa_context() = default;

bool llama_kv_cache_swaa_context::next() {
    assert(status == LLAMA_MEMORY_STATUS_SUCCESS);

    if (ctx_base) {
        ctx_base->next();
    }
    if (ctx_ring) {
        ctx_ring->next();
    }

    return ++i_next < ubatches.size();
}

bool llama_kv_cache_swaa_context::apply() {
    assert(!llama_memory_status_is_fail(status));

    bool res = true;

    // an update may be due in one of the caches only
    for (auto * ctx : { ctx_base.get(), ctx_ring.get() }) {
        if (ctx && ctx->get_status() != LLAMA_MEMORY_STATUS_NO_UPDATE) {
            res = res & ctx->apply();
        }
    }

    win_base.reset();
    win_ring.reset();

    if (!ubatches.empty() && is_windowed()) {
        win_base = std::make_unique<llama_swaa_window>(*kv->get_base(), kv->get_view(get_phase()), ubatches[i_next]);
    }
    if (!ubatches.empty() && get_phase() == LLAMA_SWAA_PHASE_PREFILL && ctx_ring && kv->can_gather()) {
        win_ring = std::make_unique<llama_swaa_window>(*kv->get_ring(), get_schedule(), ubatches[i_next]);
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

const llama_swaa_schedule & llama_kv_cache_swaa_context::get_schedule() const {
    return kv->get_schedule();
}

const llama_kv_cache_context * llama_kv_cache_swaa_context::get_base() const {
    return static_cast<const llama_kv_cache_context *>(ctx_base.get());
}

const llama_kv_cache_context * llama_kv_cache_swaa_context::get_ring() const {
    return static_cast<const llama_kv_cache_context *>(ctx_ring.get());
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

    return has_window && get_schedule().has(mode) && (ubatches.empty() || kv->is_hiding(ubatches[i_next], phase));
}

bool llama_kv_cache_swaa_context::is_windowed() const {
    return is_windowed(LLAMA_SWAA_MODE_FULL) || is_windowed(LLAMA_SWAA_MODE_PREFILL);
}

uint32_t llama_kv_cache_swaa_context::get_n_gather(const llama_kv_cache & kv_cur, const llama_swaa_window * win, const llama_ubatch & ubatch, uint32_t n_kv) const {
    if (!kv->can_gather()) {
        return 0;
    }

    if (win) {
        return kv->n_gather(win->size(), n_kv);
    }

    // to reserve: the widest gather of any ubatch, which the largest ubatch may be too large for
    const uint32_t n_widest = (n_kv - 1)/LLAMA_SWAA_N_PAD*LLAMA_SWAA_N_PAD;

    const auto n_gather = [&](uint32_t n_tokens) {
        return kv->n_gather(std::min(kv->n_seen_max(kv_cur, n_tokens), n_widest), n_kv);
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

    return get_n_gather(*kv->get_base(), win_base.get(), ubatch, get_base()->get_n_kv());
}

uint32_t llama_kv_cache_swaa_context::get_n_gather_ring(const llama_ubatch & ubatch) const {
    return get_phase() == LLAMA_SWAA_PHASE_PREFILL ? get_n_gather(*kv->get_ring(), win_ring.get(), ubatch, get_ring()->get_n_kv()) : 0;
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

llama_kv_cache_swaa * llama_kv_cache_swaa_context::get_kv() const {
    return kv;
}

//
// interface implementation
//

void llama_swaa_set_prompt_end(llama_context * ctx, llama_seq_id seq_id, llama_pos pos) {
    auto * kv = dynamic_cast<llama_kv_cache_swaa *>(llama_get_memory(ctx));

    // without a schedule the phases have no meaning
    if (kv) {
        kv->set_prompt_end(seq_id, pos);
    }
}

bool llama_swaa_set_draft_start(llama_context * ctx, llama_seq_id seq_id, llama_pos pos) {
    auto * kv = dynamic_cast<llama_kv_cache_swaa *>(llama_get_memory(ctx));

    return kv && kv->set_draft_start(seq_id, pos);
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
