from preparing.differences import differences


def test_a_line_for_each_difference():
    muq = {"id": "MuQ", "revision": "a", "recipe": {"window": 10, "layers": [1, 2]}}
    found = {"encoders": {"muq": muq, "latent": {"id": "x"}}, "dtype": "float32", "seed": 1, "recordings": "a1"}
    changed = {**muq, "revision": None, "recipe": {"window": 5, "layers": [1, 2]}}
    expected = {"encoders": {"muq": changed, "mert": {"id": "y"}}, "dtype": "float16", "seed": 1, "recordings": "b2"}
    assert differences(found, expected).splitlines() == [
        "",
        "  muq revision: 'a' there, None now",
        "  muq recipe window: 10 there, 5 now",
        "  latent: only in the store",
        "  mert: not in the store",
        "  dtype: 'float32' there, 'float16' now",
        "  the recordings, their captions or their split",
    ]
    assert differences(found, found) == ""
