#pragma once

// What a graph of a model with a schedule attends to
//
// llama_kv_cache_swaa_context makes this input for llm_graph_context::build_attn_inp_kv() or build_attn_inp_kv_iswa(), and
// build_attn() asks it for the K, V and masks of each layer. For a hybrid model build_inp_mem_hybrid() puts it beside that of
// the recurrent layers.

#include "llama-graph.h"

#include <cstdint>
#include <vector>

class llama_kv_cache;
class llama_kv_cache_swaa_context;

//
// llm_graph_input_attn_swaa
//

// the input of llm_graph_context::build_attn() for a model with a schedule
// self_kq_mask, self_k_idxs and self_v_idxs are those of the base cache
class llm_graph_input_attn_swaa : public llm_graph_input_attn_kv {
public:
    llm_graph_input_attn_swaa(
                    ggml_context * ctx,
              const llama_ubatch & ubatch,
             const llama_hparams & hparams,
             const llama_cparams & cparams,
             const llama_kv_cache_swaa_context * mctx);
    ~llm_graph_input_attn_swaa() = default;

    void set_input(const llama_ubatch * ubatch) override;

    bool can_reuse(const llm_graph_params & params) override;

    // the same for a memory that mctx is a part of
    bool can_reuse(const llama_kv_cache_swaa_context * mctx_new, const llama_ubatch & ubatch);

    attn_kv build_kv(const llm_graph_context & graph, ggml_tensor * k_cur, ggml_tensor * v_cur, int il) const override;

    // how many nodes this adds to a graph at most
    static uint32_t n_nodes(uint32_t n_layer, uint32_t n_tokens);

    // what self_kq_mask is made of, nullptr: it is an input itself
    ggml_tensor * mask_shared = nullptr; // F32/F16 [n_kv, 1, 1, n_stream]
    ggml_tensor * mask_tail   = nullptr; // F32/F16 [n_tail, n_batch/n_stream, 1, n_stream]
    ggml_tensor * mask_made   = nullptr;

    // self_kq_mask in views of some tokens each. all layers have the same, what another device needs of them is copied once
    std::vector<ggml_tensor *> mask_parts;

    // idxs: nullptr: attend to the cache as it is
    ggml_tensor * win_idxs = nullptr; // I32 [n_gather*n_stream*n_block]
    ggml_tensor * win_mask = nullptr; // F32/F16 [n_gather, n_batch/(n_stream*n_block), 1, n_stream*n_block] or [n_kv, n_batch/n_stream, 1, n_stream]

    ggml_tensor * ring_k_idxs   = nullptr; // I64 [n_batch]
    ggml_tensor * ring_v_idxs   = nullptr; // I64 [n_batch] or [n_batch*n_embd_v_gqa]
    ggml_tensor * ring_win_idxs = nullptr; // as win_idxs
    ggml_tensor * ring_kq_mask  = nullptr; // as win_mask

    // of the layers with a window of the model's own
    ggml_tensor * own_k_idxs   = nullptr;
    ggml_tensor * own_v_idxs   = nullptr;
    ggml_tensor * own_win_idxs = nullptr;
    ggml_tensor * own_kq_mask  = nullptr;
    ggml_tensor * own_k_rot    = nullptr;
    ggml_tensor * own_v_rot    = nullptr;

    const llama_kv_cache_swaa_context * mctx_swaa;

private:
    // by the llama_swaa_mode of a layer
    const bool is_windowed_full;
    const bool is_windowed_prefill;

    attn_kv gather(const llm_graph_context & graph, const llama_kv_cache & kv_cur, ggml_tensor * idxs, ggml_tensor * mask, int il) const;
};

//
// llm_graph_input_attn_swaa_iswa
//

// the same for the graphs of models with sliding windows of their own
class llm_graph_input_attn_swaa_iswa : public llm_graph_input_attn_kv_iswa {
public:
    llm_graph_input_attn_swaa_iswa(
                    ggml_context * ctx,
              const llama_ubatch & ubatch,
             const llama_hparams & hparams,
             const llama_cparams & cparams,
             const llama_kv_cache_swaa_context * mctx);
    ~llm_graph_input_attn_swaa_iswa() = default;

    void set_input(const llama_ubatch * ubatch) override;

    bool can_reuse(const llm_graph_params & params) override;

    attn_kv build_kv(const llm_graph_context & graph, ggml_tensor * k_cur, ggml_tensor * v_cur, int il) const override;

private:
    llm_graph_input_attn_swaa inp;
};

//
// llm_graph_input_mem_hybrid_swaa
//

// the input of a hybrid model with a schedule, whose inp_attn is a llm_graph_input_attn_swaa
class llm_graph_input_mem_hybrid_swaa : public llm_graph_input_mem_hybrid {
public:
    using llm_graph_input_mem_hybrid::llm_graph_input_mem_hybrid;

    void set_input(const llama_ubatch * ubatch) override;

    bool can_reuse(const llm_graph_params & params) override;
};
