"""Every method can be named in a config, and its fields can be set there. What pages say is tested in test_docs.py."""

import pytest

from configs import folder
from configs import point as point_config
from jaxpeft import config, methods


@pytest.mark.parametrize("name", methods.METHODS)
def test_every_method_has_a_config(name):
    c = point_config.get_config(f"method={name},size=4")
    fields = {key: value for key, value in c.method.items() if key != "name"}
    if name == "selective":
        fields["leaves"] = "norm"
    made = methods.build(name, "none", **fields)
    size = methods.size_field(name)
    assert methods.size_of(c.method) == (4 if size else 0)
    if size:
        inner = [getattr(one, "method", one) for one in made]
        assert 4 in [getattr(one, size, None) for one in inner]
    assert c.optim.lr > 0


def test_common_settings_can_be_set():
    c = config.get_config("vqa", "lora")
    c.method.alpha = "16"
    assert methods.build("lora", **{k: v for k, v in c.method.items() if k != "name"})[0].scale == 2.0
    assert folder.get_config("root=pics,annotations=captions.csv,method=prefix,size=4").method.length == 4
