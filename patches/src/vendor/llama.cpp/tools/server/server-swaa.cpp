// A schedule in the server: what cannot work with it, the tail of a request, and how far back a ring holds what is needed
//
// Relies on, of llama.cpp: the C interface alone (llama_model_swaa_get(), llama_swaa_has_ring(), ...); the list of ways to draft,
// common_speculative_type; and of server-context.cpp the arithmetic of checkpoints, in which n_swa is how many tokens before
// the next are needed.

#include "server-swaa.h"

#include "speculative.h"

#include <algorithm>
#include <stdexcept>
#include <vector>

// as llama_model_swaa_set_tail()
static constexpr int32_t SERVER_SWAA_MAX_TAIL = 1 << 30;

static std::vector<uint8_t> server_swaa_modes(const llama_model * model) {
    std::vector<uint8_t> res(llama_model_n_layer(model));

    if (!llama_model_swaa_get(model, nullptr, nullptr, res.data(), res.size())) {
        res.clear();
    }

    return res;
}

// whether the schedule has layers that are always windowed
static bool server_swaa_has_always(const llama_model * model) {
    const auto modes = server_swaa_modes(model);

    return std::find(modes.begin(), modes.end(), LLAMA_SWAA_MODE_ALWAYS) != modes.end();
}

static bool server_swaa_is_recurrent(const llama_model * model) {
    return llama_model_is_recurrent(model) || llama_model_is_hybrid(model);
}

bool server_swaa_needs_checkpoints(const llama_context * ctx) {
    return llama_swaa_has_ring(ctx) || server_swaa_is_recurrent(llama_get_model(ctx));
}

json server_swaa_props(const llama_model * model) {
    uint32_t window = 0;
    uint32_t n_sink = 0;

    if (!llama_model_swaa_get(model, &window, &n_sink, nullptr, 0)) {
        return nullptr;
    }

    // in the letters of the log and of overrides
    std::string layer_modes;
    for (const auto mode : server_swaa_modes(model)) {
        layer_modes += "FPA"[mode];
    }

    return {
        { "window",      window },
        { "sinks",       n_sink },
        { "layer_modes", layer_modes },
        { "tail",        llama_model_swaa_tail(model) },
    };
}

int32_t server_swaa_parse_tail(const json & value) {
    // a conversion alone would take a fraction or a truth value for a number, and the largest are negative
    const int64_t n_tail = value.is_number_integer() ? value.get<int64_t>() : -1;
    if (n_tail < 0 || n_tail > SERVER_SWAA_MAX_TAIL) {
        throw std::invalid_argument(string_format("%s is not a number of tokens, an integer from 0 to %d", safe_json_to_str(value).c_str(), SERVER_SWAA_MAX_TAIL));
    }
    return n_tail;
}

std::string server_swaa_refusal(const llama_model * model, const llama_context * ctx_dft, const common_params & params) {
    if (ctx_dft && llama_swaa_has_ring(ctx_dft)) {
        return "the draft model has a schedule with always windowed layers, or beside windows of its own, which cannot take a rejected draft back: take another draft model";
    }

    if (server_swaa_modes(model).empty()) {
        return "";
    }

    if (!params.mmproj.path.empty()) {
        return "a schedule counts tokens of text, not those of images and sounds: leave out --mmproj, or the schedule";
    }

    for (const auto type : params.speculative.types) {
        switch (type) {
            case COMMON_SPECULATIVE_TYPE_DRAFT_EAGLE3:
            case COMMON_SPECULATIVE_TYPE_DRAFT_MTP:
            case COMMON_SPECULATIVE_TYPE_DRAFT_DFLASH:
            case COMMON_SPECULATIVE_TYPE_DRAFT_DSPARK:
                return common_speculative_type_to_str(type) + " drafts from the hidden states of full attention: take another --spec-type, or no schedule";
            default:
                break;
        }
    }

    if (!server_swaa_has_always(model)) {
        return "";
    }

    if (params.swa_full) {
        return "--swa-full keeps what an always windowed layer drops: leave it out, or take FA decode or no schedule";
    }
    if (params.ctx_shift) {
        return "--context-shift moves positions, which an always windowed layer cannot: leave it out, or take FA decode or no schedule";
    }
    if (params.n_cache_reuse > 0) {
        return "--cache-reuse moves positions, which an always windowed layer cannot: leave it out, or take FA decode or no schedule";
    }

    return "";
}

std::string server_swaa_refusal_window(const common_params & params) {
    if (!params.speculative.has_window()) {
        return "";
    }

    if (!params.mmproj.path.empty()) {
        return "a window of drafts counts tokens of text, not those of images and sounds: leave out --mmproj, or take another --spec-type";
    }

    // a draft is checked together with the token before it
    const int32_t n_max = params.speculative.window.n_max;
    if (n_max >= params.n_batch) {
        return string_format("%d drafted tokens and the one before them do not fit into a batch of %d: lower --spec-window-n-max, or raise -b", n_max, params.n_batch);
    }

    return "";
}

bool server_swaa_can_roll_back(const llama_context * ctx, const common_params & params) {
    if (!llama_swaa_has_ring(ctx)) {
        return true;
    }

    // the tokens of one ubatch overwrite nothing that the first of them sees, and neither do as many ubatches of one token, for
    // which a ring has cells beside its window. other sequences in the same ring may
    const int64_t n_check = 1 + common_speculative_n_max(&params.speculative);

    return params.n_parallel == 1 ? n_check <= params.n_ubatch : !params.kv_unified && params.n_parallel*n_check <= params.n_ubatch;
}

int32_t server_swaa_n_back(const llama_context * ctx, int32_t n_swa) {
    // the next token is one of the window, and the server asks for one more than it needs
    if (n_swa == 0 || !llama_swaa_has_ring(ctx)) {
        return n_swa;
    }

    return server_swaa_is_recurrent(llama_get_model(ctx)) ? 0 : std::max(n_swa, 2) - 2;
}
