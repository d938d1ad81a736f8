"""Which layers of a model a schedule may touch."""

import pytest

from swaa_local.schedule.model_layers import LayerKind, ModelLayers

S, W, R = LayerKind.SLIDES, LayerKind.OWN_WINDOW, LayerKind.RECURRENT


def test_a_number_of_layers_is_that_many_that_slide():
    layers = ModelLayers.of(3)
    assert layers.sliding == (0, 1, 2)
    assert layers.all_slide
    assert ModelLayers.of(layers) is layers
    assert layers.refusal([2, 1, 0]) is None


def test_layers_by_kind():
    layers = ModelLayers((W, W, S, R), own_window=512)
    assert layers.n_layer == 4
    assert layers.sliding == (2,)
    assert not layers.all_slide
    assert layers.of_kind(W) == (0, 1)
    assert layers.in_words(W) == "own window (512 tokens)"
    assert layers.in_words(R) == "recurrent"


@pytest.mark.parametrize("mode", [1, 2])
@pytest.mark.parametrize(("layer", "what"), [(1, r"has a window of its own \(512 tokens\)"), (3, "is recurrent")])
def test_a_mode_for_a_layer_that_cannot_slide_is_refused_by_name(layer, what, mode):
    layers = ModelLayers((W, W, S, R), own_window=512)
    modes = [0, 0, 1, 0]
    assert layers.refusal(modes) is None
    modes[layer] = mode
    said = rf"mode {mode} for layer {layer}, .*: layer {layer} {what} and cannot slide; .* that can are 2$"
    with pytest.raises(AssertionError, match=said):
        raise AssertionError(layers.refusal(modes))


def test_where_no_layer_slides_the_refusal_says_so():
    assert "no layer of this model can" in (ModelLayers((R, R)).refusal([0, 1]) or "")


def test_layers_that_share_a_cache_are_both_rings_or_neither():
    layers = ModelLayers((W, S, W, S), own_window=512, kv_of=(0, 1, 0, 1))
    assert [layers.reads_own_kv(i) for i in range(4)] == [True, True, False, False]
    assert layers.refusal([0, 2, 0, 2]) is None
    assert layers.refusal([0, 1, 0, 0]) is None
    assert "layer 3 reads the KV cache of layer 1" in (layers.refusal([0, 2, 0, 1]) or "")
