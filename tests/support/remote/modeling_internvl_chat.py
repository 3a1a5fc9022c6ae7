"""A small model with the interface of the remote-code InternVL host: how it reads its tower, and its projector.

Written from the interface alone. There is no language model; `extract_feature` is all that reads the tower.
"""

from torch import nn
from transformers import PreTrainedModel

from sfa_adapters.testing.modeling_intern_vit import InternVisionConfig, InternVisionModel


class InternVLChatModel(PreTrainedModel):
    config_class = InternVisionConfig

    def __init__(self, config, select_layer=-1):
        super().__init__(config)
        self.select_layer = select_layer
        self.vision_model = InternVisionModel(config)
        self.mlp1 = nn.Linear(config.hidden_size, config.hidden_size)
        self.post_init()

    def _init_weights(self, module):
        pass

    def extract_feature(self, pixel_values):
        if self.select_layer == -1:
            features = self.vision_model(pixel_values=pixel_values).last_hidden_state
        else:
            out = self.vision_model(pixel_values=pixel_values, output_hidden_states=True)
            features = out.hidden_states[self.select_layer]
        return self.mlp1(features[:, 1:])
