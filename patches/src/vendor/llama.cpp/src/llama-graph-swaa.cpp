// What a graph of a model with a schedule attends to
//
// Relies on, of llama.cpp:
//   - llm_graph_context::build_attn(), which calls build_kv() after it has put q, k and v into the graph, and attends with
//     the tokens of each mask in turn (patches "a memory may choose what a layer attends to", "attend with some tokens at a
//     time"); what it does for a cache without a schedule is done here too
//   - build_attn_mha(), which divides the tokens of q among the streams of k (ne[3]), and so among the blocks of a window
//   - llm_graph_input_attn_kv and llm_graph_input_attn_kv_iswa, their set_input() and can_reuse(), which this replaces: an
//     input that no layer uses has no buffer. of the latter, build_attn() uses the rotations and build_kv() alone
//   - llm_graph_input_mem_hybrid, whose set_input() and can_reuse() this replaces: what changes there of the recurrent part has to here
//   - llama_kv_cache: get_k_storage() and get_v_storage() are [n_embd_gqa, kv_size, n_stream], with the heads of a cell
//     one after the other; V is transposed without flash attention
// and of ggml:
//   - ggml_get_rows() copies rows of integers as they are and converts those of other types to F32
//   - a tensor whose backend is set stays there (ggml_backend_sched_set_tensor_backend())

#include "llama-graph-swaa.h"

#include "llama-batch.h"
#include "llama-cparams.h"
#include "llama-hparams.h"
#include "llama-kv-cache-swaa.h"
#include "llama-memory-hybrid-swaa.h"
#include "llama-swaa.h"
#include "llama-swaa-mask.h"

#include <algorithm>

// a long cache is read in step by this many tokens, more of them fall out of it and read it from memory each (CUDA)
static constexpr uint32_t LLAMA_SWAA_N_PART = 512;

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
    is_windowed_full(mctx->is_windowed(LLAMA_SWAA_MODE_FULL)),
    is_windowed_prefill(mctx->is_windowed(LLAMA_SWAA_MODE_PREFILL)) {
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

    if (is_windowed_full || is_windowed_prefill) {
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

    if (const auto * own = mctx->get_own()) {
        own_k_idxs = own->build_input_k_idxs(ctx, ubatch);
        own_v_idxs = own->build_input_v_idxs(ctx, ubatch);

        const uint32_t n_gather = mctx->get_n_gather_own(ubatch);

        if (n_gather > 0) {
            own_win_idxs = llama_swaa_new_idxs(ctx, n_gather*n_block, "attn_inp_win_idxs_own");
            own_kq_mask  = llama_swaa_new_mask(ctx, n_gather, n_tokens, n_block, cparams, "attn_inp_kq_mask_own");
        } else {
            own_kq_mask  = llama_swaa_new_mask(ctx, own->get_n_kv(), n_tokens, n_stream, cparams, "attn_inp_kq_mask_own");
        }

        own_k_rot = own->build_input_k_rot(ctx);
        own_v_rot = own->build_input_v_rot(ctx);
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

    if (const auto * own = mctx_swaa->get_own()) {
        if (is_used(own_k_idxs)) {
            own->set_input_k_idxs(own_k_idxs, ubatch);
        }
        if (is_used(own_v_idxs)) {
            own->set_input_v_idxs(own_v_idxs, ubatch);
        }
        if (is_used(own_win_idxs)) {
            mctx_swaa->get_win_own().set_input_idxs(own_win_idxs);
            mctx_swaa->get_win_own().set_input_mask(own_kq_mask, *ubatch, true);
        } else if (is_used(own_kq_mask)) {
            own->set_input_kq_mask(own_kq_mask, ubatch, true);
        }
        if (is_used(own_k_rot)) {
            own->set_input_k_rot(own_k_rot);
        }
        if (is_used(own_v_rot)) {
            own->set_input_v_rot(own_v_rot);
        }
    }

    if (is_used(self_k_rot)) {
        (base ? base : ring)->set_input_k_rot(self_k_rot);
    }
    if (is_used(self_v_rot)) {
        (base ? base : ring)->set_input_v_rot(self_v_rot);
    }
}

bool llm_graph_input_attn_swaa::can_reuse(const llm_graph_params & params) {
    return can_reuse(static_cast<const llama_kv_cache_swaa_context *>(params.mctx), params.ubatch);
}

bool llm_graph_input_attn_swaa::can_reuse(const llama_kv_cache_swaa_context * mctx_new, const llama_ubatch & ubatch) {
    this->mctx_swaa = mctx_new;
    this->mctx      = mctx_new->get_base();

    if (mctx_new->is_windowed(LLAMA_SWAA_MODE_FULL) != is_windowed_full || mctx_new->is_windowed(LLAMA_SWAA_MODE_PREFILL) != is_windowed_prefill) {
        return false;
    }

    const uint32_t n_tokens = ubatch.n_tokens;
    const uint32_t n_stream = llama_swaa_n_stream(*mctx_new->get_kv(), ubatch);
    const uint32_t n_block  = llama_swaa_n_block (*mctx_new->get_kv(), ubatch);

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
            const uint32_t n_tail = mctx_new->get_n_tail(ubatch);

            res &= is_mask(self_kq_mask, base->get_n_kv(), n_stream);
            res &= n_tail == (mask_tail ? mask_tail->ne[0] : 0);
        }

        if (is_windowed_full || is_windowed_prefill) {
            res &= is_window(win_idxs, win_mask, mctx_new->get_n_gather_base(ubatch), base->get_n_kv());
        }
    }

    if (const auto * ring = mctx_new->get_ring()) {
        res &= ring_k_idxs->ne[0] == n_tokens;
        res &= is_window(ring_win_idxs, ring_kq_mask, mctx_new->get_n_gather_ring(ubatch), ring->get_n_kv());
    }

    if (const auto * own = mctx_new->get_own()) {
        res &= own_k_idxs->ne[0] == n_tokens;
        res &= is_window(own_win_idxs, own_kq_mask, mctx_new->get_n_gather_own(ubatch), own->get_n_kv());
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

// from a cache on the host, what a device attends to is copied to it
static bool llama_swaa_is_copied(const llm_graph_context & graph, const ggml_tensor * cache) {
    return ggml_backend_sched_get_n_backends(graph.sched) > 1 && ggml_backend_buffer_is_host(cache->buffer);
}

// [n_embd_head*n_head_kv, kv_size, n_stream_all] -> [n_embd_head, n_head_kv, n_gather, n_block]
static ggml_tensor * llama_swaa_gather(const llm_graph_context & graph, ggml_tensor * cache, ggml_tensor * idxs, int64_t n_block, int64_t n_embd_head, int64_t n_head_kv) {
    ggml_context * ctx = graph.ctx0;

    ggml_tensor * rows = ggml_reshape_2d(ctx, cache, cache->ne[0], cache->ne[1]*cache->ne[2]);

    // ggml_get_rows() converts to f32, except for integers
    const bool is_raw = !ggml_is_quantized(cache->type) && ggml_row_size(cache->type, cache->ne[0])%sizeof(int32_t) == 0;

    if (is_raw) {
        rows = llama_swaa_view_as(ctx, rows, GGML_TYPE_I32);
    }

    rows = ggml_get_rows(ctx, rows, idxs);

    // not all of the cache for some of its rows
    if (llama_swaa_is_copied(graph, cache)) {
        ggml_backend_sched_set_tensor_backend(graph.sched, rows, graph.backend_cpu);
    }

    if (is_raw) {
        rows = llama_swaa_view_as(ctx, rows, cache->type);
    }

    const int64_t n_gather = rows->ne[1]/n_block;

    return ggml_view_4d(ctx, rows, n_embd_head, n_head_kv, n_gather, n_block,
            ggml_row_size(rows->type, n_embd_head), rows->nb[1], rows->nb[1]*n_gather, 0);
}

llm_graph_input_attn_kv::attn_kv llm_graph_input_attn_swaa::gather(
    const llm_graph_context & graph,
       const llama_kv_cache & kv_cur,
                ggml_tensor * idxs,
                ggml_tensor * mask,
                        int   il) const {
    const int64_t n_block   = mask->ne[3];
    const int64_t n_head_kv = hparams.n_head_kv(il);

    return {
        llama_swaa_gather(graph, kv_cur.get_k_storage(il), idxs, n_block, hparams.n_embd_head_k(il), n_head_kv),
        llama_swaa_gather(graph, kv_cur.get_v_storage(il), idxs, n_block, hparams.n_embd_head_v(il), n_head_kv),
        { mask },
    };
}

llm_graph_input_attn_kv::attn_kv llm_graph_input_attn_swaa::build_kv(
    const llm_graph_context & graph,
                ggml_tensor * k_cur,
                ggml_tensor * v_cur,
                        int   il) const {
    ggml_context * ctx = graph.ctx0;

    // a layer that reads the cache of another one has nothing to store
    const auto store = [&](const llama_kv_cache_context * kv_cur, ggml_tensor * k_idxs, ggml_tensor * v_idxs) {
        if (k_cur) {
            ggml_build_forward_expand(graph.gf, kv_cur->cpy_k(ctx, k_cur, k_idxs, il));
        }
        if (v_cur) {
            ggml_build_forward_expand(graph.gf, kv_cur->cpy_v(ctx, v_cur, v_idxs, il));
        }
    };

    if (mctx_swaa->get_kv()->is_own(il)) {
        const auto * own = mctx_swaa->get_own();

        store(own, own_k_idxs, own_v_idxs);

        if (own_win_idxs) {
            return gather(graph, *mctx_swaa->get_kv()->get_own(), own_win_idxs, own_kq_mask, il);
        }

        return { own->get_k(ctx, il), own->get_v(ctx, il), { own_kq_mask } };
    }

    const auto mode = mctx_swaa->get_schedule().mode(il);

    if (mode == LLAMA_SWAA_MODE_ALWAYS) {
        const auto * ring = mctx_swaa->get_ring();

        store(ring, ring_k_idxs, ring_v_idxs);

        if (ring_win_idxs) {
            return gather(graph, *mctx_swaa->get_kv()->get_ring(), ring_win_idxs, ring_kq_mask, il);
        }

        return { ring->get_k(ctx, il), ring->get_v(ctx, il), { ring_kq_mask } };
    }

    const auto * base = mctx_swaa->get_base();

    store(base, self_k_idxs, self_v_idxs);

    if (mode == LLAMA_SWAA_MODE_PREFILL ? is_windowed_prefill : is_windowed_full) {
        if (win_idxs) {
            return gather(graph, *mctx_swaa->get_kv()->get_base(), win_idxs, win_mask, il);
        }

        return { base->get_k(ctx, il), base->get_v(ctx, il), { win_mask } };
    }

    if (mask_made) {
        ggml_build_forward_expand(graph.gf, mask_made);
    }

    attn_kv res = { base->get_k(ctx, il), base->get_v(ctx, il), mask_parts };

    // not for each part by itself
    if (llama_swaa_is_copied(graph, mctx_swaa->get_kv()->get_base()->get_k_storage(il))) {
        res.masks = { self_kq_mask };
    }

    return res;
}

uint32_t llm_graph_input_attn_swaa::n_nodes(uint32_t n_layer, uint32_t n_tokens) {
    // for a layer: what gathers takes 12 nodes, and so does attending with a part of the tokens
    const uint32_t n_part = (n_tokens + LLAMA_SWAA_N_PART - 1)/LLAMA_SWAA_N_PART;

    return n_layer*12*(1 + n_part) + 64;
}

//
// llm_graph_input_attn_swaa_iswa
//

llm_graph_input_attn_swaa_iswa::llm_graph_input_attn_swaa_iswa(
                ggml_context * ctx,
          const llama_ubatch & ubatch,
         const llama_hparams & hparams,
         const llama_cparams & cparams,
         const llama_kv_cache_swaa_context * mctx) :
    llm_graph_input_attn_kv_iswa(hparams, cparams, nullptr),
    inp(ctx, ubatch, hparams, cparams, mctx) {
    self_k_rot     = inp.self_k_rot;
    self_v_rot     = inp.self_v_rot;
    self_k_rot_swa = inp.own_k_rot;
    self_v_rot_swa = inp.own_v_rot;
}

void llm_graph_input_attn_swaa_iswa::set_input(const llama_ubatch * ubatch) {
    inp.set_input(ubatch);
}

bool llm_graph_input_attn_swaa_iswa::can_reuse(const llm_graph_params & params) {
    return inp.can_reuse(params);
}

llm_graph_input_attn_kv_iswa::attn_kv llm_graph_input_attn_swaa_iswa::build_kv(
    const llm_graph_context & graph,
                ggml_tensor * k_cur,
                ggml_tensor * v_cur,
                        int   il) const {
    return inp.build_kv(graph, k_cur, v_cur, il);
}

//
// llm_graph_input_mem_hybrid_swaa
//

void llm_graph_input_mem_hybrid_swaa::set_input(const llama_ubatch * ubatch) {
    inp_attn->set_input(ubatch);
    inp_rs  ->set_input(ubatch);
}

bool llm_graph_input_mem_hybrid_swaa::can_reuse(const llm_graph_params & params) {
    const auto * mctx_new = static_cast<const llama_memory_hybrid_swaa_context *>(params.mctx);
    const auto * recr     = mctx_new->get_recr();

    this->mctx   = mctx_new;
    inp_rs->mctx = recr;

    bool res = static_cast<llm_graph_input_attn_swaa *>(inp_attn.get())->can_reuse(mctx_new->get_attn_swaa(), params.ubatch);

    res &= inp_rs->s_copy->ne[0] == recr->get_n_rs();

    res &= inp_rs->s_copy_main->ne[0]  == params.ubatch.n_seqs;
    res &= inp_rs->s_copy_extra->ne[0] == recr->get_n_rs() - params.ubatch.n_seqs;

    res &= inp_rs->head == recr->get_head();
    res &= inp_rs->rs_z == recr->get_rs_z();

    return res;
}
