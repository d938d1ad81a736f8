// A schedule in the server: what cannot work with it, and how far back a ring holds what is needed
//
// Relies on, of llama.cpp: the C interface alone (llama_model_swaa_get()); the list of ways to draft, common_speculative_type;
// and of server-context.cpp the arithmetic of checkpoints, in which n_swa is how many tokens before the next are needed.

#include "server-swaa.h"

#include "speculative.h"

#include <algorithm>
#include <vector>

static std::vector<uint8_t> server_swaa_modes(const llama_model * model) {
    std::vector<uint8_t> res(llama_model_n_layer(model));

    if (!llama_model_swaa_get(model, nullptr, nullptr, res.data(), res.size())) {
        res.clear();
    }

    return res;
}

bool server_swaa_has_ring(const llama_model * model) {
    const auto modes = server_swaa_modes(model);

    return std::find(modes.begin(), modes.end(), LLAMA_SWAA_MODE_ALWAYS) != modes.end();
}

std::string server_swaa_refusal(const llama_model * model, const llama_model * model_dft, const common_params & params) {
    if (model_dft && server_swaa_has_ring(model_dft)) {
        return "the draft model has always windowed layers, which cannot take a rejected draft back: take another draft model";
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

    if (!server_swaa_has_ring(model)) {
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

int32_t server_swaa_n_back(const llama_model * model, int32_t n_swa) {
    // the next token is one of the window, and the server asks for one more than it needs
    return n_swa > 0 && server_swaa_has_ring(model) ? std::max(n_swa, 2) - 2 : n_swa;
}
