#include "llama-kv-cache-swaa.h"

#include "llama-batch.h"
#include "llama-context.h"
#include "llama-impl.h"
#include "llama-io.h"
#include "llama-model.h"

#include <algorithm>
#include <limits>
#include <stdexcept>

// the attention width of a graph grows in such steps, so that graphs can be reused and the fast kernels apply
static constexpr uint32_t LLAMA_SWAA_N_PAD = 256;

// a long cache is read in step by this many tokens, more of them fall out of it and read it from memory each (CUDA)
static constexpr uint32_t LLAMA_SWAA_N_PART = 512;

// the causal mask is made by two ops, of which the second writes into the output of the first: they have to run on one device
static bool llama_swaa_can_make_mask(const llama_model & model) {
    ggml_init_params params = {
        /*.mem_size   =*/ 8*ggml_tensor_overhead(),
        /*.mem_buffer =*/ NULL,
        /*.no_alloc   =*/ true,
    };
    ggml_context_ptr ctx { ggml_init(params) };

    ggml_tensor * row  = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F16, 512, 1);
    ggml_tensor * tail = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F16, 256, 32);
    ggml_tensor * mask = ggml_repeat_4d(ctx.get(), row, 512, 32, 1, 1);
    ggml_tensor * made = ggml_cpy(ctx.get(), tail, ggml_view_2d(ctx.get(), mask, 256, 32, mask->nb[1], 256*mask->nb[0]));

    for (uint32_t il = 0; il < model.hparams.n_layer(); ++il) {
        ggml_backend_dev_t dev = model.dev_layer(il);

        if (dev && !(ggml_backend_dev_supports_op(dev, mask) && ggml_backend_dev_supports_op(dev, made))) {
            return false;
        }
    }

    return true;
}

//
// llama_kv_cache_swaa
//

llama_kv_cache_swaa::llama_kv_cache_swaa(
        const llama_model & model,
                ggml_type   type_k,
                ggml_type   type_v,
      const llama_cparams & cparams) :
    schedule(model.swaa), n_ctx(cparams.n_ctx_seq), n_seq_max(cparams.n_seq_max), unified(cparams.kv_unified),
    v_trans(!cparams.flash_attn), make_mask(llama_swaa_can_make_mask(model)), prompt_end(LLAMA_MAX_SEQ, -1) {
    if (!cparams.causal_attn) {
        throw std::runtime_error("a swaa schedule needs causal attention");
    }

    LLAMA_LOG_INFO("%s: %s\n", __func__, schedule.str().c_str());

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
        // a token that several sequences share is decoded only if it is for all of them
        bool decode = true;

        for (int32_t s = 0; s < batch.n_seq_id[i]; ++s) {
            const llama_seq_id seq_id = batch.seq_id[i][s];

            decode = decode && (prompt_end[seq_id] < 0 ? n_tokens_seq[seq_id] == 1 : batch.pos[i] >= prompt_end[seq_id]);
        }

        res[i] = decode ? 1 : 0;
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

        std::vector<llama_ubatch> ubatches;
        std::vector<bool>         decode;
        while (true) {
            auto ubatch = is_multi ? balloc.split_equal(n_ubatch, true, 0) : balloc.split_simple(n_ubatch);

            if (ubatch.n_tokens == 0) {
                break;
            }

            decode.push_back(phases[ubatch.data->batch_idxs[0]] == 1);
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
                this, std::move(sinfos_base), std::move(sinfos_ring), std::move(ubatches), std::move(decode));
    } while (false);

    return std::make_unique<llama_kv_cache_swaa_context>(LLAMA_MEMORY_STATUS_FAILED_PREPARE);
}

llama_memory_context_ptr llama_kv_cache_swaa::init_full() {
    return std::make_unique<llama_kv_cache_swaa_context>(this);
}

llama_memory_context_ptr llama_kv_cache_swaa::init_update(llama_context * lctx, bool optimize) {
    return std::make_unique<llama_kv_cache_swaa_context>(this, lctx, optimize);
}

bool llama_kv_cache_swaa::get_can_shift() const {
    return !kv_ring && kv_base->get_can_shift();
}

void llama_kv_cache_swaa::state_write(llama_io_write_i & io, llama_seq_id seq_id, llama_state_seq_flags flags) const {
    schedule.state_write(io);

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
    schedule.state_check(io);

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

bool llama_kv_cache_swaa::is_hiding(const llama_ubatch & ubatch) const {
    const int64_t n_seen = (int64_t) schedule.n_sink + schedule.window;

    return std::any_of(ubatch.pos, ubatch.pos + ubatch.n_tokens, [&](llama_pos pos) { return pos >= n_seen; });
}

bool llama_kv_cache_swaa::can_make_mask() const {
    return make_mask;
}

bool llama_kv_cache_swaa::can_gather() const {
    return !v_trans;
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
        llama_kv_cache_swaa * kv) : kv(kv), status(LLAMA_MEMORY_STATUS_SUCCESS) {
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
        std::vector<bool> decode) :
    kv(kv), ubatches(std::move(ubatches)), decode(std::move(decode)), status(LLAMA_MEMORY_STATUS_SUCCESS) {
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
        win_base = std::make_unique<llama_swaa_window>(*kv->get_base(), get_schedule(), ubatches[i_next]);
    }
    if (!ubatches.empty() && is_prefill() && ctx_ring && kv->can_gather()) {
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

const llama_swaa_schedule & llama_kv_cache_swaa_context::get_schedule() const {
    return kv->get_schedule();
}

const llama_kv_cache_context * llama_kv_cache_swaa_context::get_base() const {
    return static_cast<const llama_kv_cache_context *>(ctx_base.get());
}

const llama_kv_cache_context * llama_kv_cache_swaa_context::get_ring() const {
    return static_cast<const llama_kv_cache_context *>(ctx_ring.get());
}

bool llama_kv_cache_swaa_context::is_prefill() const {
    return ubatches.empty() ? reserve == LLAMA_SWAA_FORM_WINDOW || reserve == LLAMA_SWAA_FORM_WINDOW_HOST : !decode[i_next];
}

bool llama_kv_cache_swaa_context::is_windowed() const {
    return is_prefill() && get_schedule().has(LLAMA_SWAA_MODE_PREFILL) && (ubatches.empty() || kv->is_hiding(ubatches[i_next]));
}

void llama_kv_cache_swaa_context::set_reserve(int value) {
    reserve = value;
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
    return is_windowed() ? get_n_gather(*kv->get_base(), win_base.get(), ubatch, get_base()->get_n_kv()) : 0;
}

uint32_t llama_kv_cache_swaa_context::get_n_gather_ring(const llama_ubatch & ubatch) const {
    return is_prefill() ? get_n_gather(*kv->get_ring(), win_ring.get(), ubatch, get_ring()->get_n_kv()) : 0;
}

uint32_t llama_kv_cache_swaa_context::get_n_tail(const llama_ubatch & ubatch) const {
    if (!kv->can_make_mask()) {
        return 0;
    }

    const uint32_t n_stream = llama_swaa_n_stream(*kv->get_base(), ubatch);
    const uint32_t n_kv     = get_base()->get_n_kv();

    const uint32_t res = llama_swaa_n_tail(ubatch.n_tokens/n_stream, n_kv);

    const bool ok = ubatches.empty() ? reserve == LLAMA_SWAA_FORM_WINDOW || reserve == LLAMA_SWAA_FORM_FULL_MADE : res > 0 && llama_swaa_can_share(*kv->get_base(), ubatch, n_kv, res);

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

bool llama_swaa_set_reserve(llama_memory_context_i * mctx, int form) {
    auto * mctx_swaa = dynamic_cast<llama_kv_cache_swaa_context *>(mctx);

    if (!mctx_swaa || form >= LLAMA_SWAA_FORM_COUNT) {
        return false;
    }

    mctx_swaa->set_reserve(form);

    return true;
}

uint32_t llama_swaa_max_nodes(const llama_memory_i * memory, uint32_t n_tokens) {
    const auto * kv = dynamic_cast<const llama_kv_cache_swaa *>(memory);

    if (!kv) {
        return 0;
    }

    // for a layer: what gathers takes 12 nodes, and so does attending with a part of the tokens
    const uint32_t n_part = (n_tokens + LLAMA_SWAA_N_PART - 1)/LLAMA_SWAA_N_PART;

    return kv->get_schedule().modes.size()*12*(1 + n_part) + 64;
}

//
// llm_graph_input_attn_swaa
//

static uint32_t llama_swaa_n_stream(const llama_kv_cache_swaa & kv, const llama_ubatch & ubatch) {
    return llama_swaa_n_stream(kv.get_base() ? *kv.get_base() : *kv.get_ring(), ubatch);
}

// the streams of an ubatch, each divided into the blocks of its window
static uint32_t llama_swaa_n_block(const llama_kv_cache_swaa & kv, const llama_ubatch & ubatch) {
    const uint32_t n_stream = llama_swaa_n_stream(kv, ubatch);

    return n_stream*llama_swaa_window::n_block(ubatch.n_tokens/n_stream);
}

static ggml_tensor * llama_swaa_new_mask(ggml_context * ctx, uint32_t n_kv, uint32_t n_rows, uint32_t n_stream, const llama_cparams & cparams, const char * name) {
    // flash attention requires an f16 mask
    ggml_tensor * res = ggml_new_tensor_4d(ctx, cparams.flash_attn ? GGML_TYPE_F16 : GGML_TYPE_F32, n_kv, n_rows/n_stream, 1, n_stream);

    ggml_set_input(res);
    ggml_set_name(res, name);

    return res;
}

static ggml_tensor * llama_swaa_new_idxs(ggml_context * ctx, uint32_t n, const char * name) {
    ggml_tensor * res = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, n);

    ggml_set_input(res);
    ggml_set_name(res, name);

    return res;
}

llm_graph_input_attn_swaa::llm_graph_input_attn_swaa(
                ggml_context * ctx,
          const llama_ubatch & ubatch,
         const llama_hparams & hparams,
         const llama_cparams & cparams,
         const llama_kv_cache_swaa_context * mctx) :
    llm_graph_input_attn_kv(hparams, cparams, mctx->get_base()),
    mctx_swaa(mctx),
    is_windowed(mctx->is_windowed()) {
    const auto * base = mctx->get_base();
    const auto * ring = mctx->get_ring();

    const uint32_t n_tokens = ubatch.n_tokens;
    const uint32_t n_stream = llama_swaa_n_stream(*mctx->get_kv(), ubatch);
    const uint32_t n_block  = llama_swaa_n_block (*mctx->get_kv(), ubatch);

    if (base) {
        self_k_idxs = base->build_input_k_idxs(ctx, ubatch);
        self_v_idxs = base->build_input_v_idxs(ctx, ubatch);

        const uint32_t n_kv   = base->get_n_kv();
        const uint32_t n_tail = mctx->get_n_tail(ubatch);

        if (n_tail > 0) {
            mask_shared = llama_swaa_new_mask(ctx, n_kv,   n_stream, n_stream, cparams, "attn_inp_kq_mask_shared");
            mask_tail   = llama_swaa_new_mask(ctx, n_tail, n_tokens, n_stream, cparams, "attn_inp_kq_mask_tail");

            self_kq_mask = ggml_repeat_4d(ctx, mask_shared, n_kv, n_tokens/n_stream, 1, n_stream);

            mask_made = ggml_cpy(ctx, mask_tail, ggml_view_4d(ctx, self_kq_mask, n_tail, n_tokens/n_stream, 1, n_stream,
                    self_kq_mask->nb[1], self_kq_mask->nb[2], self_kq_mask->nb[3], (n_kv - n_tail)*self_kq_mask->nb[0]));
        } else {
            self_kq_mask = llama_swaa_new_mask(ctx, n_kv, n_tokens, n_stream, cparams, "attn_inp_kq_mask");
        }

        self_kq_mask_cnv = self_kq_mask;

        const uint32_t n_part = cparams.flash_attn && n_stream == 1 ? std::min(n_tokens, LLAMA_SWAA_N_PART) : n_tokens;

        for (uint32_t i = 0; n_part < n_tokens && i < n_tokens; i += n_part) {
            mask_parts.push_back(ggml_view_2d(ctx, self_kq_mask, n_kv, std::min(n_part, n_tokens - i),
                    self_kq_mask->nb[1], i*self_kq_mask->nb[1]));
        }
        if (mask_parts.empty()) {
            mask_parts.push_back(self_kq_mask);
        }
    }

    if (is_windowed) {
        const uint32_t n_gather = mctx->get_n_gather_base(ubatch);

        if (n_gather > 0) {
            win_idxs = llama_swaa_new_idxs(ctx, n_gather*n_block, "attn_inp_win_idxs");
            win_mask = llama_swaa_new_mask(ctx, n_gather, n_tokens, n_block, cparams, "attn_inp_win_mask");
        } else {
            win_mask = llama_swaa_new_mask(ctx, base->get_n_kv(), n_tokens, n_stream, cparams, "attn_inp_win_mask");
        }
    }

    if (ring) {
        ring_k_idxs = ring->build_input_k_idxs(ctx, ubatch);
        ring_v_idxs = ring->build_input_v_idxs(ctx, ubatch);

        const uint32_t n_gather = mctx->get_n_gather_ring(ubatch);

        if (n_gather > 0) {
            ring_win_idxs = llama_swaa_new_idxs(ctx, n_gather*n_block, "attn_inp_win_idxs_ring");
            ring_kq_mask  = llama_swaa_new_mask(ctx, n_gather, n_tokens, n_block, cparams, "attn_inp_kq_mask_ring");
        } else {
            ring_kq_mask  = llama_swaa_new_mask(ctx, ring->get_n_kv(), n_tokens, n_stream, cparams, "attn_inp_kq_mask_ring");
        }
    }

    // the rotations depend on the head sizes and the cache types, which both caches share
    self_k_rot = (base ? base : ring)->build_input_k_rot(ctx);
    self_v_rot = (base ? base : ring)->build_input_v_rot(ctx);
}

void llm_graph_input_attn_swaa::set_input(const llama_ubatch * ubatch) {
    const auto * base = mctx_swaa->get_base();
    const auto * ring = mctx_swaa->get_ring();

    const auto * kv = mctx_swaa->get_kv();

    // note: the inputs that no layer of the graph uses are not allocated
    const auto is_used = [](const ggml_tensor * t) { return t && t->buffer; };

    if (is_used(self_k_idxs)) {
        base->set_input_k_idxs(self_k_idxs, ubatch);
    }
    if (is_used(self_v_idxs)) {
        base->set_input_v_idxs(self_v_idxs, ubatch);
    }
    if (is_used(mask_shared)) {
        llama_swaa_set_input_shared(mask_shared, *kv->get_base(), *ubatch);
        llama_swaa_set_input_tail  (mask_tail,   *kv->get_base(), *ubatch, mask_shared->ne[0]);
    } else if (is_used(self_kq_mask)) {
        base->set_input_kq_mask(self_kq_mask, ubatch, true);
    }

    if (is_used(win_idxs)) {
        mctx_swaa->get_win_base().set_input_idxs(win_idxs);
    }
    if (is_used(win_mask)) {
        mctx_swaa->get_win_base().set_input_mask(win_mask, *ubatch, win_idxs != nullptr);
    }

    if (is_used(ring_k_idxs)) {
        ring->set_input_k_idxs(ring_k_idxs, ubatch);
    }
    if (is_used(ring_v_idxs)) {
        ring->set_input_v_idxs(ring_v_idxs, ubatch);
    }
    if (is_used(ring_win_idxs)) {
        mctx_swaa->get_win_ring().set_input_idxs(ring_win_idxs);
        mctx_swaa->get_win_ring().set_input_mask(ring_kq_mask, *ubatch, true);
    } else if (is_used(ring_kq_mask)) {
        ring->set_input_kq_mask(ring_kq_mask, ubatch, true);
    }

    if (is_used(self_k_rot)) {
        (base ? base : ring)->set_input_k_rot(self_k_rot);
    }
    if (is_used(self_v_rot)) {
        (base ? base : ring)->set_input_v_rot(self_v_rot);
    }
}

bool llm_graph_input_attn_swaa::can_reuse(const llm_graph_params & params) {
    const auto * mctx_new = static_cast<const llama_kv_cache_swaa_context *>(params.mctx);

    this->mctx_swaa = mctx_new;
    this->mctx      = mctx_new->get_base();

    if (mctx_new->is_windowed() != is_windowed) {
        return false;
    }

    const uint32_t n_tokens = params.ubatch.n_tokens;
    const uint32_t n_stream = llama_swaa_n_stream(*mctx_new->get_kv(), params.ubatch);
    const uint32_t n_block  = llama_swaa_n_block (*mctx_new->get_kv(), params.ubatch);

    bool res = true;

    const auto is_mask = [&](const ggml_tensor * mask, uint32_t n_kv, uint32_t n) {
        return mask->ne[0] == n_kv && mask->ne[1] == n_tokens/n && mask->ne[3] == n;
    };

    const auto is_window = [&](const ggml_tensor * idxs, const ggml_tensor * mask, uint32_t n_gather, uint32_t n_kv) {
        return (n_gather > 0) == (idxs != nullptr) && (n_gather > 0 ? is_mask(mask, n_gather, n_block) : is_mask(mask, n_kv, n_stream));
    };

    if (const auto * base = mctx_new->get_base()) {
        res &= self_k_idxs->ne[0] == n_tokens;

        // without a full layer, a windowed graph does not depend on how much of the cache is in use
        if (self_kq_mask->buffer) {
            const uint32_t n_tail = mctx_new->get_n_tail(params.ubatch);

            res &= is_mask(self_kq_mask, base->get_n_kv(), n_stream);
            res &= n_tail == (mask_tail ? mask_tail->ne[0] : 0);
        }

        if (is_windowed) {
            res &= is_window(win_idxs, win_mask, mctx_new->get_n_gather_base(params.ubatch), base->get_n_kv());
        }
    }

    if (const auto * ring = mctx_new->get_ring()) {
        res &= ring_k_idxs->ne[0] == n_tokens;
        res &= is_window(ring_win_idxs, ring_kq_mask, mctx_new->get_n_gather_ring(params.ubatch), ring->get_n_kv());
    }

    return res;
}

// the same bytes as elements of another type
static ggml_tensor * llama_swaa_view_as(ggml_context * ctx, ggml_tensor * a, ggml_type type) {
    ggml_tensor * res = ggml_view_tensor(ctx, a);

    res->op     = GGML_OP_VIEW;
    res->src[0] = a;
    res->type   = type;
    res->ne[0]  = a->ne[0]*ggml_type_size(a->type)/ggml_type_size(type);
    res->nb[0]  = ggml_type_size(type);

    return res;
}

// [n_embd_head*n_head_kv, kv_size, n_stream_all] -> [n_embd_head, n_head_kv, n_gather, n_block]
static ggml_tensor * llama_swaa_gather(ggml_context * ctx, ggml_tensor * cache, ggml_tensor * idxs, int64_t n_block, int64_t n_embd_head, int64_t n_head_kv) {
    ggml_tensor * rows = ggml_reshape_2d(ctx, cache, cache->ne[0], cache->ne[1]*cache->ne[2]);

    // ggml_get_rows() converts to f32, except for integers
    const bool is_raw = !ggml_is_quantized(cache->type) && ggml_row_size(cache->type, cache->ne[0])%sizeof(int32_t) == 0;

    if (is_raw) {
        rows = llama_swaa_view_as(ctx, rows, GGML_TYPE_I32);
    }

    rows = ggml_get_rows(ctx, rows, idxs);

    if (is_raw) {
        rows = llama_swaa_view_as(ctx, rows, cache->type);
    }

    const int64_t n_gather = rows->ne[1]/n_block;

    return ggml_view_4d(ctx, rows, n_embd_head, n_head_kv, n_gather, n_block,
            ggml_row_size(rows->type, n_embd_head), rows->nb[1], rows->nb[1]*n_gather, 0);
}

llm_graph_input_attn_swaa::kv llm_graph_input_attn_swaa::gather(ggml_context * ctx, const llama_kv_cache & kv_cur, ggml_tensor * idxs, ggml_tensor * mask, int32_t il) const {
    const int64_t n_block   = mask->ne[3];
    const int64_t n_head_kv = hparams.n_head_kv(il);

    return {
        llama_swaa_gather(ctx, kv_cur.get_k_storage(il), idxs, n_block, hparams.n_embd_head_k(il), n_head_kv),
        llama_swaa_gather(ctx, kv_cur.get_v_storage(il), idxs, n_block, hparams.n_embd_head_v(il), n_head_kv),
        { mask },
    };
}

llm_graph_input_attn_swaa::kv llm_graph_input_attn_swaa::build(ggml_context * ctx, ggml_cgraph * gf, ggml_tensor * k_cur, ggml_tensor * v_cur, int32_t il) const {
    const auto mode = mctx_swaa->get_schedule().mode(il);

    if (mode == LLAMA_SWAA_MODE_ALWAYS) {
        const auto * ring = mctx_swaa->get_ring();

        ggml_build_forward_expand(gf, ring->cpy_k(ctx, k_cur, ring_k_idxs, il));
        ggml_build_forward_expand(gf, ring->cpy_v(ctx, v_cur, ring_v_idxs, il));

        if (ring_win_idxs) {
            return gather(ctx, *mctx_swaa->get_kv()->get_ring(), ring_win_idxs, ring_kq_mask, il);
        }

        return { ring->get_k(ctx, il), ring->get_v(ctx, il), { ring_kq_mask } };
    }

    const auto * base = mctx_swaa->get_base();

    ggml_build_forward_expand(gf, base->cpy_k(ctx, k_cur, self_k_idxs, il));
    ggml_build_forward_expand(gf, base->cpy_v(ctx, v_cur, self_v_idxs, il));

    if (mode == LLAMA_SWAA_MODE_PREFILL && is_windowed) {
        if (win_idxs) {
            return gather(ctx, *mctx_swaa->get_kv()->get_base(), win_idxs, win_mask, il);
        }

        return { base->get_k(ctx, il), base->get_v(ctx, il), { win_mask } };
    }

    if (mask_made) {
        ggml_build_forward_expand(gf, mask_made);
    }

    return { base->get_k(ctx, il), base->get_v(ctx, il), mask_parts };
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

size_t llama_swaa_kv_bytes(const llama_context * ctx) {
    size_t res = 0;

    if (const auto * memory = llama_get_memory(ctx)) {
        for (const auto & [_, size] : memory->memory_breakdown()) {
            res += size;
        }
    }

    return res;
}
