// The schedule of a model: its keys in the file, the architectures that can have one, and the C interface
//
// Relies on, of llama.cpp:
//   - llama_model_loader::metadata and kv_overrides, which load_hparams() calls this with once the hparams are known
//   - of the architectures in llama_swaa_arch_supported(), that the graph attends through build_attn_inp_kv() or
//     build_attn_inp_kv_iswa() alone and that create_memory() gives them a plain KV cache or one of each kind of layer; of those
//     in llama_swaa_hybrid_supported(), the same of build_inp_mem_hybrid() and llama_memory_hybrid; of others, the hparams that
//     tell why not (swa_type, is_mla(), ...)
//   - is_swa(), n_swa and swa_type, which tell the windows of the model's own, and n_layer_kv_from_start, after which layers
//     share KV caches (the reuse callback in create_memory())
//   - of hybrid models, which layers create_memory() gives a KV cache (llama_swaa_has_attn())
//   - llama_io_write_i and llama_io_read_i: a state begins with n_stream, which is never LLAMA_SWAA_STATE_MAGIC

#include "llama-swaa.h"

#include "llama-arch.h"
#include "llama-hparams.h"
#include "llama-impl.h"
#include "llama-io.h"
#include "llama-model.h"
#include "llama-model-loader.h"

#include "gguf.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

static constexpr uint32_t LLAMA_SWAA_STATE_VERSION = 1;

static constexpr uint32_t LLAMA_SWAA_GGUF_VERSION = 1;

static const char * const LLAMA_SWAA_KEY_VERSION     = "swaa.version";
static const char * const LLAMA_SWAA_KEY_WINDOW      = "swaa.window";
static const char * const LLAMA_SWAA_KEY_SINKS       = "swaa.sinks";
static const char * const LLAMA_SWAA_KEY_LAYER_MODES = "swaa.layer_modes";
static const char * const LLAMA_SWAA_KEY_TAIL        = "swaa.tail";

// far above any context, low enough for sums of positions, windows and sinks to fit a llama_pos
static constexpr uint32_t LLAMA_SWAA_MAX_TOKENS = 1u << 30;

//
// llama_swaa_schedule
//

bool llama_swaa_schedule::any() const {
    return has(LLAMA_SWAA_MODE_PREFILL) || has(LLAMA_SWAA_MODE_ALWAYS);
}

bool llama_swaa_schedule::has(llama_swaa_mode mode) const {
    return std::find(modes.begin(), modes.end(), mode) != modes.end();
}

llama_swaa_mode llama_swaa_schedule::mode(int32_t il) const {
    return (llama_swaa_mode) modes.at(il);
}

bool llama_swaa_schedule::is_compatible(const llama_swaa_schedule & other) const {
    return window == other.window && n_sink == other.n_sink && modes == other.modes;
}

std::string llama_swaa_schedule::str() const {
    if (!any()) {
        return "full attention in all layers";
    }

    std::string map;
    for (const auto m : modes) {
        map += "FPA"[m];
    }

    return format("window = %u, sinks = %u, layers = %s (F: full, P: windowed prefill, A: always windowed)",
            window, n_sink, map.c_str());
}

void llama_swaa_schedule::state_write(llama_io_write_i & io) const {
    const uint32_t n_layer = modes.size();

    io.write(&LLAMA_SWAA_STATE_MAGIC,   sizeof(LLAMA_SWAA_STATE_MAGIC));
    io.write(&LLAMA_SWAA_STATE_VERSION, sizeof(LLAMA_SWAA_STATE_VERSION));
    io.write(&window,                   sizeof(window));
    io.write(&n_sink,                   sizeof(n_sink));
    io.write(&n_layer,                  sizeof(n_layer));
    io.write(modes.data(),              n_layer*sizeof(modes[0]));
}

void llama_swaa_schedule::state_check(llama_io_read_i & io) const {
    uint32_t magic;
    uint32_t version;

    io.read(&magic, sizeof(magic));
    if (magic != LLAMA_SWAA_STATE_MAGIC) {
        throw std::runtime_error(format("the state was saved without a swaa schedule, the context has: %s", str().c_str()));
    }

    io.read(&version, sizeof(version));
    if (version != LLAMA_SWAA_STATE_VERSION) {
        throw std::runtime_error(format("the state has swaa version %u, expected %u", version, LLAMA_SWAA_STATE_VERSION));
    }

    llama_swaa_schedule saved;
    uint32_t n_layer;

    io.read(&saved.window, sizeof(saved.window));
    io.read(&saved.n_sink, sizeof(saved.n_sink));
    io.read(&n_layer,      sizeof(n_layer));

    if (n_layer != modes.size()) {
        throw std::runtime_error(format("the state was saved under a swaa schedule of %u layers, the context has %zu", n_layer, modes.size()));
    }

    saved.modes.resize(n_layer);
    io.read(saved.modes.data(), n_layer*sizeof(saved.modes[0]));

    if (std::any_of(saved.modes.begin(), saved.modes.end(), [](uint8_t m) { return m > LLAMA_SWAA_MODE_ALWAYS; })) {
        throw std::runtime_error("the swaa schedule of the state is corrupt");
    }

    if (!is_compatible(saved)) {
        throw std::runtime_error(format("the state was saved under another swaa schedule: %s; the context has: %s",
                    saved.str().c_str(), str().c_str()));
    }
}

//
// loading
//

// val_default - what a missing key stands for, NULL: it is needed
static uint32_t llama_swaa_get_u32(const llama_model_loader & ml, const char * key, const uint32_t * val_default = nullptr) {
    const auto it = ml.kv_overrides.find(key);
    if (it != ml.kv_overrides.end()) {
        const auto & ovrd = it->second;

        if (ovrd.tag != LLAMA_KV_OVERRIDE_TYPE_INT || ovrd.val_i64 < 0 || ovrd.val_i64 > UINT32_MAX) {
            throw std::runtime_error(format("the override of key %s is not an int of 32 bits", key));
        }

        LLAMA_LOG_INFO("%s: %s = %u (override)\n", __func__, key, (uint32_t) ovrd.val_i64);

        return ovrd.val_i64;
    }

    const auto * meta = ml.metadata;

    const int64_t kid = gguf_find_key(meta, key);

    if (kid < 0 && val_default) {
        return *val_default;
    }
    if (kid < 0) {
        throw std::runtime_error(format("key %s is missing, but the file has other swaa.* keys", key));
    }
    if (gguf_get_kv_type(meta, kid) != GGUF_TYPE_UINT32) {
        throw std::runtime_error(format("key %s has type %s, expected u32", key, gguf_type_name(gguf_get_kv_type(meta, kid))));
    }

    return gguf_get_val_u32(meta, kid);
}

static void llama_swaa_validate_tail(uint32_t n_tail) {
    if (n_tail > LLAMA_SWAA_MAX_TOKENS) {
        throw std::runtime_error(format("%s = %u, expected 0 to %u", LLAMA_SWAA_KEY_TAIL, n_tail, LLAMA_SWAA_MAX_TOKENS));
    }
}

uint32_t llama_swaa_own_window(const llama_hparams & hparams, uint32_t il) {
    return hparams.swa_type == LLAMA_SWA_TYPE_STANDARD && hparams.is_swa(il) ? std::clamp(hparams.n_swa, 1u, LLAMA_SWAA_MAX_TOKENS) : 0;
}

bool llama_swaa_can_slide(const llama_hparams & hparams, uint32_t il) {
    return llama_swaa_own_window(hparams, il) == 0;
}

uint32_t llama_swaa_kv_layer(const llama_hparams & hparams, uint32_t il) {
    const int32_t n_own = hparams.n_layer_kv_from_start;

    return n_own < 2 || hparams.has_kv(il) ? il : n_own - (hparams.is_swa(il) ? 2 : 1);
}

bool llama_swaa_has_attn(const llama_model & model, uint32_t il) {
    const auto & hparams = model.hparams;

    // layers for multi-token prediction are no part of the model's memory
    if (il >= hparams.n_layer()) {
        return false;
    }

    switch (model.arch) {
        case LLM_ARCH_FALCON_H1:
            // in all layers, beside a recurrence
            return true;
        case LLM_ARCH_NEMOTRON_H:
        case LLM_ARCH_NEMOTRON_H_MOE:
            return !hparams.is_recr(il) && hparams.n_ff(il) == 0;
        default:
            return !llm_arch_is_hybrid(model.arch) || !hparams.is_recr(il);
    }
}

// throws if a layer without attention has a window
static void llama_swaa_validate_attn(const llama_swaa_schedule & schedule, const llama_model & model) {
    for (uint32_t il = 0; il < schedule.modes.size(); ++il) {
        if (schedule.modes[il] != LLAMA_SWAA_MODE_FULL && !llama_swaa_has_attn(model, il)) {
            throw std::runtime_error(format("swaa.layer_modes[%u] = %u, but layer %u %s and cannot slide: expected 0 (full)",
                        il, schedule.modes[il], il, model.hparams.is_recr(il) ? "is recurrent" : "has no attention"));
        }
    }
}

// throws if the values do not make a schedule for the model
static void llama_swaa_validate(const llama_swaa_schedule & schedule, const llama_hparams & hparams) {
    const uint32_t n_layer = hparams.n_layer();

    if (schedule.modes.size() != n_layer) {
        throw std::runtime_error(format("swaa.layer_modes has %zu entries, but the model has %u layers", schedule.modes.size(), n_layer));
    }
    for (uint32_t il = 0; il < n_layer; ++il) {
        if (schedule.modes[il] > LLAMA_SWAA_MODE_ALWAYS) {
            throw std::runtime_error(format("swaa.layer_modes[%u] = %u, expected 0 (full), 1 (windowed prefill) or 2 (always windowed)", il, schedule.modes[il]));
        }
    }
    for (uint32_t il = 0; il < n_layer; ++il) {
        if (schedule.modes[il] != LLAMA_SWAA_MODE_FULL && !llama_swaa_can_slide(hparams, il)) {
            throw std::runtime_error(format("swaa.layer_modes[%u] = %u, but layer %u has a window of its own (%u tokens) and cannot slide: expected 0 (full)",
                        il, schedule.modes[il], il, llama_swaa_own_window(hparams, il)));
        }

        const uint32_t il_kv = llama_swaa_kv_layer(hparams, il);
        if ((schedule.modes[il] == LLAMA_SWAA_MODE_ALWAYS) != (schedule.modes[il_kv] == LLAMA_SWAA_MODE_ALWAYS)) {
            throw std::runtime_error(format("swaa.layer_modes[%u] = %u and swaa.layer_modes[%u] = %u, but layer %u reads the KV cache of layer %u: expected 2 (always windowed) for both or neither",
                        il, schedule.modes[il], il_kv, schedule.modes[il_kv], il, il_kv));
        }
    }
    if (schedule.any() && (schedule.window < 1 || schedule.window > LLAMA_SWAA_MAX_TOKENS)) {
        throw std::runtime_error(format("swaa.window = %u, expected 1 to %u", schedule.window, LLAMA_SWAA_MAX_TOKENS));
    }
    if (schedule.any() && schedule.n_sink > LLAMA_SWAA_MAX_TOKENS) {
        throw std::runtime_error(format("swaa.sinks = %u, expected 0 to %u", schedule.n_sink, LLAMA_SWAA_MAX_TOKENS));
    }
}

static llama_swaa_schedule llama_swaa_read(const llama_model_loader & ml, const llama_hparams & hparams) {
    const auto * meta = ml.metadata;

    const auto is_ours = [](const std::string & key) { return key.rfind("swaa.", 0) == 0; };

    bool found = false;
    for (int64_t i = 0; i < gguf_get_n_kv(meta); ++i) {
        found = found || is_ours(gguf_get_key(meta, i));
    }
    for (const auto & [key, _] : ml.kv_overrides) {
        found = found || is_ours(key);
    }
    if (!found) {
        return {};
    }

    const uint32_t version = llama_swaa_get_u32(ml, LLAMA_SWAA_KEY_VERSION);
    if (version != LLAMA_SWAA_GGUF_VERSION) {
        throw std::runtime_error(format("%s = %u, but this build reads version %u", LLAMA_SWAA_KEY_VERSION, version, LLAMA_SWAA_GGUF_VERSION));
    }

    llama_swaa_schedule res;

    res.window = llama_swaa_get_u32(ml, LLAMA_SWAA_KEY_WINDOW);
    res.n_sink = llama_swaa_get_u32(ml, LLAMA_SWAA_KEY_SINKS);
    res.n_tail = llama_swaa_get_u32(ml, LLAMA_SWAA_KEY_TAIL, &res.n_tail);

    llama_swaa_validate_tail(res.n_tail);

    if (res.window == 0) {
        throw std::runtime_error(format("%s = 0, expected at least 1", LLAMA_SWAA_KEY_WINDOW));
    }

    const char * key_modes = LLAMA_SWAA_KEY_LAYER_MODES;

    const auto it = ml.kv_overrides.find(key_modes);
    if (it != ml.kv_overrides.end()) {
        // an override cannot be an array, but a str that names the mode of each layer as str() does
        static const std::string names = "FPA";

        const auto & ovrd = it->second;

        if (ovrd.tag != LLAMA_KV_OVERRIDE_TYPE_STR) {
            throw std::runtime_error(format("the override of key %s is not a str", key_modes));
        }

        for (const char * c = ovrd.val_str; *c; ++c) {
            const size_t mode = names.find(*c);
            if (mode == std::string::npos) {
                throw std::runtime_error(format("the override of key %s has '%c', expected F (full), P (windowed prefill) or A (always windowed)", key_modes, *c));
            }
            res.modes.push_back(mode);
        }

        LLAMA_LOG_INFO("%s: %s = %s (override)\n", __func__, key_modes, ovrd.val_str);
    } else {
        const int64_t kid = gguf_find_key(meta, key_modes);
        if (kid < 0) {
            throw std::runtime_error(format("key %s is missing, but the file has other swaa.* keys", key_modes));
        }
        if (gguf_get_kv_type(meta, kid) != GGUF_TYPE_ARRAY || gguf_get_arr_type(meta, kid) != GGUF_TYPE_INT32) {
            throw std::runtime_error(format("key %s is not an array of i32", key_modes));
        }

        const int32_t * modes = (const int32_t *) gguf_get_arr_data(meta, kid);
        for (size_t i = 0; i < gguf_get_arr_n(meta, kid); ++i) {
            if (modes[i] < LLAMA_SWAA_MODE_FULL || modes[i] > LLAMA_SWAA_MODE_ALWAYS) {
                throw std::runtime_error(format("%s[%zu] = %d, expected 0 (full), 1 (windowed prefill) or 2 (always windowed)", key_modes, i, modes[i]));
            }
            res.modes.push_back(modes[i]);
        }
    }

    llama_swaa_validate(res, hparams);

    return res.any() ? res : llama_swaa_schedule{};
}

// the architectures whose graphs attend through build_attn_inp_kv() or build_attn_inp_kv_iswa() alone, one plain causal
// attention per layer
static bool llama_swaa_arch_supported(llm_arch arch) {
    switch (arch) {
        case LLM_ARCH_AFMOE:
        case LLM_ARCH_APERTUS:
        case LLM_ARCH_ARCEE:
        case LLM_ARCH_ARCTIC:
        case LLM_ARCH_BAICHUAN:
        case LLM_ARCH_BAILINGMOE:
        case LLM_ARCH_BAILINGMOE2:
        case LLM_ARCH_BITNET:
        case LLM_ARCH_CHAMELEON:
        case LLM_ARCH_CHATGLM:
        case LLM_ARCH_CODESHELL:
        case LLM_ARCH_COHERE2:
        case LLM_ARCH_COHERE2MOE:
        case LLM_ARCH_COMMAND_R:
        case LLM_ARCH_DBRX:
        case LLM_ARCH_DECI:
        case LLM_ARCH_DEEPSEEK:
        case LLM_ARCH_DOTS1:
        case LLM_ARCH_ERNIE4_5:
        case LLM_ARCH_ERNIE4_5_MOE:
        case LLM_ARCH_EXAONE:
        case LLM_ARCH_EXAONE4:
        case LLM_ARCH_EXAONE_MOE:
        case LLM_ARCH_FALCON:
        case LLM_ARCH_GEMMA:
        case LLM_ARCH_GEMMA2:
        case LLM_ARCH_GEMMA3:
        case LLM_ARCH_GEMMA3N:
        case LLM_ARCH_GEMMA4:
        case LLM_ARCH_GLM4:
        case LLM_ARCH_GLM4_MOE:
        case LLM_ARCH_GPT2:
        case LLM_ARCH_GPTNEOX:
        case LLM_ARCH_GRANITE:
        case LLM_ARCH_GRANITE_MOE:
        case LLM_ARCH_GRANITE_SWA:
        case LLM_ARCH_GROK:
        case LLM_ARCH_GROVEMOE:
        case LLM_ARCH_HUNYUAN_DENSE:
        case LLM_ARCH_HUNYUAN_MOE:
        case LLM_ARCH_HUNYUAN_VL:
        case LLM_ARCH_INTERNLM2:
        case LLM_ARCH_JAIS2:
        case LLM_ARCH_LAGUNA:
        case LLM_ARCH_LLAMA:
        case LLM_ARCH_MAINCODER:
        case LLM_ARCH_MAPLE:
        case LLM_ARCH_MELLUM:
        case LLM_ARCH_MIMO2:
        case LLM_ARCH_MINICPM:
        case LLM_ARCH_MINIMAX_M2:
        case LLM_ARCH_MISTRAL3:
        case LLM_ARCH_MUSE_GLIMMER:
        case LLM_ARCH_NEMOTRON:
        case LLM_ARCH_OLMO:
        case LLM_ARCH_OLMO2:
        case LLM_ARCH_OLMOE:
        case LLM_ARCH_OPENAI_MOE:
        case LLM_ARCH_OPENELM:
        case LLM_ARCH_ORION:
        case LLM_ARCH_PADDLEOCR:
        case LLM_ARCH_PANGU_EMBED:
        case LLM_ARCH_PHI2:
        case LLM_ARCH_PHI3:
        case LLM_ARCH_PHIMOE:
        case LLM_ARCH_PLAMO:
        case LLM_ARCH_PLAMO3:
        case LLM_ARCH_QWEN:
        case LLM_ARCH_QWEN2:
        case LLM_ARCH_QWEN2MOE:
        case LLM_ARCH_QWEN2VL:
        case LLM_ARCH_QWEN3:
        case LLM_ARCH_QWEN3MOE:
        case LLM_ARCH_QWEN3VL:
        case LLM_ARCH_QWEN3VLMOE:
        case LLM_ARCH_SEED_OSS:
        case LLM_ARCH_SMALLTHINKER:
        case LLM_ARCH_SMOLLM3:
        case LLM_ARCH_SPARK2_5:
        case LLM_ARCH_STABLELM:
        case LLM_ARCH_STARCODER:
        case LLM_ARCH_STARCODER2:
        case LLM_ARCH_STEP35:
        case LLM_ARCH_XVERSE:
            return true;
        default:
            return false;
    }
}

// the architectures whose graphs attend through build_inp_mem_hybrid() alone, some layers recurrent, one plain causal
// attention in each of the others or beside the recurrence
static bool llama_swaa_hybrid_supported(llm_arch arch) {
    switch (arch) {
        case LLM_ARCH_FALCON_H1:
        case LLM_ARCH_GRANITE_HYBRID:
        case LLM_ARCH_JAMBA:
        case LLM_ARCH_LFM2:
        case LLM_ARCH_LFM2MOE:
        case LLM_ARCH_MINIMAX_01:
        case LLM_ARCH_NEMOTRON_H:
        case LLM_ARCH_NEMOTRON_H_MOE:
        case LLM_ARCH_PLAMO2:
        case LLM_ARCH_QWEN35:
        case LLM_ARCH_QWEN35MOE:
        case LLM_ARCH_QWEN3NEXT:
            return true;
        default:
            return false;
    }
}

// the reason why the model cannot have a schedule, empty if it can
static std::string llama_swaa_unsupported(const llama_model & model) {
    const auto & hparams = model.hparams;

    const char * name = llm_arch_name(model.arch);

    if (llm_arch_is_recurrent(model.arch) || (llm_arch_is_hybrid(model.arch) && !llama_swaa_hybrid_supported(model.arch))) {
        return format("architecture '%s' has recurrent layers, and no others that are known to be plain causal attention", name);
    }
    if (hparams.swa_type == LLAMA_SWA_TYPE_CHUNKED) {
        return format("architecture '%s' attends in chunks of %u tokens, which do not slide", name, hparams.n_swa);
    }
    if (hparams.swa_type != LLAMA_SWA_TYPE_NONE && hparams.swa_type != LLAMA_SWA_TYPE_STANDARD) {
        return format("architecture '%s' has a window of its own that is not causal", name);
    }
    if (hparams.is_mla()) {
        return format("architecture '%s' has multi-head latent attention", name);
    }
    if (!hparams.causal_attn) {
        return format("architecture '%s' does not use causal attention", name);
    }
    if (hparams.use_alibi) {
        return format("architecture '%s' uses ALiBi", name);
    }
    if (llm_arch_is_hybrid(model.arch)) {
        if (hparams.swa_type != LLAMA_SWA_TYPE_NONE) {
            return format("architecture '%s' has recurrent layers beside a sliding window of its own (%u)", name, hparams.n_swa);
        }
        return "";
    }
    if (!llama_swaa_arch_supported(model.arch)) {
        return format("architecture '%s' is not known to be plain causal attention over a KV cache", name);
    }

    for (uint32_t il = 0; il < hparams.n_layer(); ++il) {
        if (llama_swaa_can_slide(hparams, il)) {
            return "";
        }
    }

    return format("architecture '%s' has a window of its own (%u tokens) in every layer", name, hparams.n_swa);
}

void llama_swaa_load(llama_model & model, const llama_model_loader & ml) {
    auto schedule = llama_swaa_read(ml, model.hparams);

    if (!schedule.any()) {
        return;
    }

    const std::string reason = llama_swaa_unsupported(model);
    if (!reason.empty()) {
        throw std::runtime_error(format("the file has a swaa schedule, but the model cannot: %s", reason.c_str()));
    }

    llama_swaa_validate_attn(schedule, model);

    LLAMA_LOG_INFO("%s: %s, tail = %u\n", __func__, schedule.str().c_str(), schedule.n_tail);

    model.swaa = std::move(schedule);
}

void llama_swaa_save(const llama_model & model, gguf_context * meta) {
    const auto & schedule = model.swaa;

    if (!schedule.any()) {
        return;
    }

    const std::vector<int32_t> modes(schedule.modes.begin(), schedule.modes.end());

    gguf_set_val_u32 (meta, LLAMA_SWAA_KEY_VERSION,     LLAMA_SWAA_GGUF_VERSION);
    gguf_set_val_u32 (meta, LLAMA_SWAA_KEY_WINDOW,      schedule.window);
    gguf_set_val_u32 (meta, LLAMA_SWAA_KEY_SINKS,       schedule.n_sink);
    gguf_set_arr_data(meta, LLAMA_SWAA_KEY_LAYER_MODES, GGUF_TYPE_INT32, modes.data(), modes.size());

    // other readers of schedules need not know the key if there is no tail
    if (schedule.n_tail > 0) {
        gguf_set_val_u32(meta, LLAMA_SWAA_KEY_TAIL, schedule.n_tail);
    }
}

//
// interface implementation
//

int32_t llama_model_swaa_set(
        llama_model * model,
           uint32_t   window,
           uint32_t   n_sink,
      const uint8_t * layer_modes,
             size_t   n_layer) {
    if (!layer_modes) {
        LLAMA_LOG_ERROR("%s: layer_modes is NULL\n", __func__);
        return -1;
    }

    llama_swaa_schedule schedule;

    schedule.window = window;
    schedule.n_sink = n_sink;
    schedule.modes.assign(layer_modes, layer_modes + n_layer);

    try {
        llama_swaa_validate(schedule, model->hparams);
    } catch (const std::exception & e) {
        LLAMA_LOG_ERROR("%s: %s\n", __func__, e.what());
        return -1;
    }

    if (!schedule.any()) {
        model->swaa = {};
        return 0;
    }

    const std::string reason = llama_swaa_unsupported(*model);
    if (!reason.empty()) {
        LLAMA_LOG_ERROR("%s: the model cannot have a swaa schedule: %s\n", __func__, reason.c_str());
        return -2;
    }

    try {
        llama_swaa_validate_attn(schedule, *model);
    } catch (const std::exception & e) {
        LLAMA_LOG_ERROR("%s: %s\n", __func__, e.what());
        return -1;
    }

    model->swaa = std::move(schedule);

    return 0;
}

int32_t llama_model_swaa_layer(const llama_model * model, int32_t il) {
    if (il < 0 || il >= (int32_t) model->hparams.n_layer()) {
        return -1;
    }

    if (llama_swaa_has_attn(*model, il)) {
        return llama_swaa_own_window(model->hparams, il);
    }

    return model->hparams.is_recr(il) ? -2 : -3;
}

int32_t llama_model_swaa_n_head_kv(const llama_model * model, int32_t il) {
    return llama_model_swaa_layer(model, il) >= 0 ? model->hparams.n_head_kv(il) : 0;
}

bool llama_model_swaa_get(
    const llama_model * model,
             uint32_t * window,
             uint32_t * n_sink,
              uint8_t * layer_modes,
               size_t   n_layer) {
    const auto & schedule = model->swaa;

    if (!schedule.any()) {
        return false;
    }

    if (layer_modes && n_layer != schedule.modes.size()) {
        LLAMA_LOG_ERROR("%s: n_layer = %zu, but the model has %zu layers\n", __func__, n_layer, schedule.modes.size());
        return false;
    }

    if (window) {
        *window = schedule.window;
    }
    if (n_sink) {
        *n_sink = schedule.n_sink;
    }
    if (layer_modes) {
        std::copy(schedule.modes.begin(), schedule.modes.end(), layer_modes);
    }

    return true;
}

int32_t llama_model_swaa_set_tail(llama_model * model, uint32_t n_tail) {
    try {
        llama_swaa_validate_tail(n_tail);
    } catch (const std::exception & e) {
        LLAMA_LOG_ERROR("%s: %s\n", __func__, e.what());
        return -1;
    }

    if (!model->swaa.any()) {
        if (n_tail > 0) {
            LLAMA_LOG_ERROR("%s: a tail of %u tokens is part of a swaa schedule, but the model has none\n", __func__, n_tail);
            return -1;
        }
        return 0;
    }

    model->swaa.n_tail = n_tail;

    return 0;
}

int32_t llama_model_swaa_set_draft(llama_model * model, uint32_t window, uint32_t n_sink) {
    if (std::max(window, n_sink) > LLAMA_SWAA_MAX_TOKENS) {
        LLAMA_LOG_ERROR("%s: window = %u, n_sink = %u, at most %u tokens can be drafted with\n", __func__, window, n_sink, LLAMA_SWAA_MAX_TOKENS);
        return -1;
    }

    std::string reason = window > 0 ? llama_swaa_unsupported(*model) : "";
    if (window > 0 && reason.empty() && llm_arch_is_hybrid(model->arch)) {
        reason = format("architecture '%s' has recurrent layers, whose state cannot take drafts back", llm_arch_name(model->arch));
    }
    if (!reason.empty()) {
        LLAMA_LOG_ERROR("%s: the model cannot draft through a window: %s\n", __func__, reason.c_str());
        return -2;
    }

    model->swaa_draft = { window, n_sink };

    return 0;
}

uint32_t llama_model_swaa_tail(const llama_model * model) {
    return model->swaa.n_tail;
}
