# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Transformers' own suites for configurations and models, on tiny DiffVP models."""

import copy
import tempfile
import unittest
from unittest import mock

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.testing_utils import set_config_for_less_flaky_test
from transformers_tests import test_modeling_common
from transformers_tests.test_configuration_common import ConfigTester
from transformers_tests.test_modeling_common import ModelTesterMixin, floats_tensor, ids_tensor, random_attention_mask

from diffvp.configuration_diffvp import DiffVPConfig
from diffvp.modeling_diffvp import DiffVPForConditionalGeneration, DiffVPForDiagnosis
from diffvp.storage_diffvp import DiffVPCheckpointError

LABELS = ("Cardiomegaly", "Lung nodule", "Emphysema")
LABEL_IDS = ([10], [11, 12], [13, 14])


class DiffVPModelTester:
    """Tiny configurations and inputs; the suites read sizes from the attributes."""

    is_training = True
    batch_size = 3
    image_size = 32
    text_length = 7
    num_latents = 4
    num_prefix_tokens = 2
    # The suites ask for the layers, heads, width and sequence length of the returned states: here, the LLM's.
    num_hidden_layers = 2
    num_attention_heads = 4
    hidden_size = 32
    vocab_size = 99
    # All labels with two separators, prefix and suffix.
    diagnosis_length = 10
    seq_length = num_prefix_tokens + num_latents + diagnosis_length + text_length

    def get_config(self) -> DiffVPConfig:
        return DiffVPConfig(
            text_config=LlamaConfig(
                vocab_size=self.vocab_size,
                hidden_size=self.hidden_size,
                intermediate_size=37,
                num_hidden_layers=self.num_hidden_layers,
                num_attention_heads=self.num_attention_heads,
                num_key_value_heads=2,
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=2,
            ),
            image_size=[self.image_size] * 3,
            encoder_block_channels=[4, 8, 8, 16],
            encoder_max_pool=False,
            diagnosis_labels=list(LABELS),
            # Every label is named, whatever the classifier predicts: the suites expect sequences of one length.
            diagnosis_threshold=0.0,
            diagnosis_prompt_ids={
                "prefix": [5, 6],
                "labels": list(LABEL_IDS),
                "separator": [7],
                "none": [8],
                "suffix": [9],
            },
            # Below 20, because the suite for configurations makes the vocabulary that small.
            instruction_ids=[1, 16, 17],
            num_latents=self.num_latents,
            latent_size=24,
            resampler_heads=2,
            global_delta_heads=3,
            num_prefix_tokens=self.num_prefix_tokens,
            prompt_hidden_size=8,
        )

    def prepare_ct(self) -> torch.Tensor:
        return floats_tensor([self.batch_size, 1, *[self.image_size] * 3]) * 2 - 1

    def prepare_config_and_inputs_for_common(self):
        return self.get_config(), {
            "ct": self.prepare_ct(),
            "reference": self.prepare_ct(),
            "input_ids": ids_tensor([self.batch_size, self.text_length], self.vocab_size),
            "attention_mask": random_attention_mask([self.batch_size, self.text_length]),
        }


class DiffVPDiagnosisModelTester(DiffVPModelTester):
    def prepare_config_and_inputs_for_common(self):
        return self.get_config(), {"ct": self.prepare_ct()}


def loosen_norms_of_the_llm(config: DiffVPConfig) -> None:
    """Apply the suite's helper to the LLM's configuration only.

    The helper assigns attributes such as `rms_norm_eps` to any configuration. A DiffVPConfig has none of them, and
    refuses a saved file with unknown keys.
    """
    set_config_for_less_flaky_test(config.text_config)


class StrictModelTesterMixin(ModelTesterMixin):
    def test_model_weights_reload_no_missing_tied_weights(self):
        """Check that a file without any of the weights is refused, and that all of them are counted as missing.

        The suite loads such a file and looks at the list of missing weights.
        """
        for model_class in self.all_model_classes:
            model = model_class(self.model_tester.get_config())
            with tempfile.TemporaryDirectory() as folder:
                model.save_pretrained(folder)
                save_file({"tensor": torch.tensor([1, 2])}, f"{folder}/model.safetensors", metadata={"format": "pt"})
                with self.assertRaisesRegex(DiffVPCheckpointError, f" {len(model.state_dict())} weight.* missing"):
                    model_class.from_pretrained(folder)


class DiffVPForConditionalGenerationTest(StrictModelTesterMixin, unittest.TestCase):
    all_model_classes = (DiffVPForConditionalGeneration,)
    additional_model_inputs = ["reference", "input_ids"]
    _is_composite = True
    # The suite unfreezes everything and expects a gradient for each parameter. Encoder and classifier run without
    # gradients, which 5.23 allows for what a model has frozen itself and 5.19 does not. On both,
    # test_every_trainable_parameter_has_a_gradient runs instead.
    test_all_params_have_gradient = False

    def setUp(self):
        self.model_tester = DiffVPModelTester()
        patches = (
            mock.patch.object(test_modeling_common, "set_config_for_less_flaky_test", loosen_norms_of_the_llm),
            # Some tests run only on the classes in transformers' own lists.
            mock.patch.dict(
                MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, {"diffvp": DiffVPForConditionalGeneration.__name__}
            ),
        )
        for patch in patches:
            patch.start()
            self.addCleanup(patch.stop)

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = copy.deepcopy(inputs_dict)
        if return_labels:
            inputs["labels"] = inputs["input_ids"].clone()
            inputs["diagnosis_labels"] = torch.ones(inputs["ct"].shape[0], len(LABELS))
        return inputs

    def test_sdpa_can_dispatch_composite_models(self):
        """Check that the LLM dispatches. The resampler is eager: the difference map uses its attention weights.

        The suite asks a model whose sub-models have other names to bring its own version of this test.
        """
        with tempfile.TemporaryDirectory() as folder:
            DiffVPForConditionalGeneration(self.model_tester.get_config()).save_pretrained(folder)
            for options, expected in (
                ({}, "sdpa"),
                ({"attn_implementation": "sdpa"}, "sdpa"),
                ({"attn_implementation": "eager"}, "eager"),
                ({"attn_implementation": {"text_config": "eager"}}, "eager"),
            ):
                with self.subTest(options):
                    model = DiffVPForConditionalGeneration.from_pretrained(folder, **options)
                    self.assertEqual(model.language_model.config._attn_implementation, expected)
                    self.assertIs(model.language_model.config, model.config.text_config)
                    attention = model.language_model.model.layers[0].self_attn
                    self.assertEqual(attention.config._attn_implementation, expected)

    def test_every_trainable_parameter_has_a_gradient(self):
        for checkpointing in (False, True):
            with self.subTest(checkpointing=checkpointing):
                config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
                model = DiffVPForConditionalGeneration(config).train()
                if checkpointing:
                    model.gradient_checkpointing_enable()
                model(**self._prepare_for_class(inputs, type(model), return_labels=True)).loss.backward()
                trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
                self.assertTrue(trainable)
                self.assertEqual(
                    {name for name, parameter in model.named_parameters() if parameter.grad is not None}, trainable
                )

    @unittest.skip(
        "the suite for generate is not in transformers' source distribution, and DiffVP's generate is its own: it "
        "encodes both scans once, hands embeddings to the LLM's and returns the new tokens alone; tests/ covers it"
    )
    def test_generation_tester_mixin_inheritance(self):
        pass

    @unittest.skip("there is no base model: the LLM is a sub-model with its own head, and is loaded by name")
    def test_model_base_model_prefix(self):
        pass


class DiffVPForDiagnosisTest(StrictModelTesterMixin, unittest.TestCase):
    all_model_classes = (DiffVPForDiagnosis,)
    has_attentions = False
    test_resize_embeddings = False

    def setUp(self):
        self.model_tester = DiffVPDiagnosisModelTester()
        patch = mock.patch.object(test_modeling_common, "set_config_for_less_flaky_test", loosen_norms_of_the_llm)
        patch.start()
        self.addCleanup(patch.stop)

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = copy.deepcopy(inputs_dict)
        if return_labels:
            inputs["labels"] = torch.ones(inputs["ct"].shape[0], len(LABELS))
        return inputs

    @unittest.skip("a convolutional classifier: it has no tokens to embed")
    def test_model_get_set_embeddings(self):
        pass

    @unittest.skip("hidden states are not among the outputs: the network is MONAI's, called as a whole")
    def test_hidden_states_output(self):
        pass

    @unittest.skip("hidden states are not among the outputs: the network is MONAI's, called as a whole")
    def test_retain_grad_hidden_states_attentions(self):
        pass

    @unittest.skip("the plan in the configuration is the LLM's, which the classifier does not contain")
    def test_tp_plan_matches_params(self):
        pass


class DiffVPConfigTest(unittest.TestCase):
    def setUp(self):
        self.model_tester = DiffVPModelTester()

    def test_config(self):
        ConfigTester(
            self,
            config_class=DiffVPConfig,
            has_text_modality=False,
            common_properties=["text_config", "image_size", "latent_size"],
            num_latents=7,
            latent_size=48,
        ).run_common_tests()
