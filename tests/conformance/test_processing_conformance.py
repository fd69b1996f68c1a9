# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Transformers' own suite for processors, on DiffVPProcessor with CTs instead of images."""

import unittest
from unittest import mock

import nibabel as nib
import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoImageProcessor, PreTrainedTokenizerFast
from transformers_tests.test_processing_common import MODALITY_TEST_SPECS, ProcessorTesterMixin

from diffvp.configuration_diffvp import DiffVPConfig
from diffvp.processing_diffvp import DiffVPImageProcessor, DiffVPProcessor

SIZE = {"depth": 8, "height": 10, "width": 12}
# Content as a string, which is what the templates of language models expect, or as the suite's list of parts.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endif %}</s>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# Instead of the suite's negative rescaling: every voxel lies below this window and becomes -1.
WINDOW_ABOVE_ALL = {"hu_window": (2000.0, 3000.0)}


def make_ct(seed: int) -> nib.Nifti1Image:
    """Make a block of soft tissue in air, as an image that carries its spacing: the suite passes no other argument."""
    voxels = np.full((16, 14, 12), -1000, np.int16)
    voxels[3:13, 2:12, 1:11] = np.random.default_rng(seed).integers(-900, 200, (10, 10, 10))
    return nib.Nifti1Image(voxels, np.diag([-2.0, -2.0, 3.0, 1.0]))


REFERENCE = make_ct(0)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer in which every byte is a token."""
    special = ["<s>", "</s>"]
    vocabulary = {token: index for index, token in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", chat_template=CHAT_TEMPLATE
    )


_call = DiffVPProcessor.__call__


def call_with_images(self, images=None, text=None, **kwargs):
    """Pass the suite's `images` as CTs, and add the reference that each call of DiffVP needs."""
    scans = {} if images is None else {"ct": images, "reference": REFERENCE}
    return _call(self, **scans, text=text, **kwargs)


class DiffVPProcessorTest(ProcessorTesterMixin, unittest.TestCase):
    processor_class = DiffVPProcessor
    images_input_name = "ct"

    @classmethod
    def setUpClass(cls):
        # Register it like a class of the library itself; otherwise the suite would have to trust remote code.
        AutoImageProcessor.register(DiffVPConfig, slow_image_processor_class=DiffVPImageProcessor)
        super().setUpClass()

    def setUp(self):
        patches = [mock.patch.dict(MODALITY_TEST_SPECS["images"], {"init_time_kwargs": WINDOW_ABOVE_ALL})]
        if not self._testMethodName.startswith(("test_init_arguments", "test_call_arguments")):  # they read signatures
            patches.append(mock.patch.object(DiffVPProcessor, "__call__", call_with_images))
        for patch in patches:
            patch.start()
            self.addCleanup(patch.stop)

    @classmethod
    def _setup_image_processor(cls):
        return DiffVPImageProcessor(size=SIZE)

    @classmethod
    def _setup_tokenizer(cls):
        return make_tokenizer()

    @staticmethod
    def prepare_processor_dict():
        return {"instruction": "Describe the scan."}

    def prepare_images_inputs(self, batch_size=None, nested=False):
        return make_ct(1) if batch_size is None else [make_ct(1 + index) for index in range(batch_size)]

    def _check_modality_outputs(self, inputs, modality):
        self.assertTrue((inputs["ct"] == -1).all())

    def test_subprocessor_defaults_0_text(self):
        """Follow the suite, but `text` is an instruction, which the processor formats as a user turn."""
        processor = self.get_processor()
        expected = processor.tokenizer(
            "<|user|>lower newer</s><|assistant|>", add_special_tokens=False, return_tensors="pt"
        )
        inputs = processor(text="lower newer")
        torch.testing.assert_close(inputs["input_ids"], expected["input_ids"])
        torch.testing.assert_close(inputs["attention_mask"], expected["attention_mask"])

    def test_save_load_pretrained_additional_features(self):
        """Follow the suite, with an argument of this image processor instead of `do_normalize`."""
        loaded = DiffVPProcessor.from_pretrained(
            self.tmpdirname, cls_token="(CLS)", sep_token="(SEP)", crop_foreground=False
        )
        self.assertEqual(loaded.tokenizer.cls_token, "(CLS)")
        self.assertEqual(loaded.tokenizer.sep_token, "(SEP)")
        self.assertIs(loaded.image_processor.crop_foreground, False)
        self.assertIs(self.get_processor().image_processor.crop_foreground, True)

    @unittest.skip("a CT is an argument of the call, not an image URL within a conversation")
    def test_apply_chat_template_image_0(self):
        pass

    @unittest.skip("a CT is an argument of the call, not an image URL within a conversation")
    def test_apply_chat_template_image_1(self):
        pass

    @unittest.skip("a batch does not mix samples with and without a CT: each is compared with a reference")
    def test_processor_text_has_no_visual(self):
        pass

    @unittest.skip("the text has no placeholder tokens to count: the model puts the visual tokens before it")
    def test_if_input_has_mismatching_tokens_and_mm_data(self):
        pass
