"""SFTConfig's own keys: which the trl recipe passes on, and which have no effect because the data layer does that work.

A table and not SFTConfig's fields, so that TRL need not be installed to read a config; a test compares them.
"""

from ovis25.training.config.kinds import Kind

PASSED_ON = {
    "loss_type": Kind((str,), choices=("nll", "dft")),
    "activation_offloading": Kind((bool,)),
    "chat_template_path": Kind((str,)),
    "eos_token": Kind((str,)),
}

WITHOUT_EFFECT = {
    "model_init_kwargs": "use dtype and attn_implementation",
    "trust_remote_code": "the model's code is this package",
    "router_aux_loss_coef": "Ovis2.5 has no experts",
    "dataset_text_field": "samples are conversations",
    "dataset_kwargs": "samples are encoded as they are read",
    "dataset_num_proc": "use dataloader_num_workers",
    "max_length": "use multimodal_max_length and text_max_length",
    "truncation_mode": "samples are never cut; see on_long_sample",
    "shuffle_dataset": "use train_sampling_strategy",
    "packing_strategy": "packed rows hold whole samples, filled by best fit and evened out by cost",
    "eval_packing": "the evaluation set is packed where packing is on",
    "padding_free": "use packing, which leaves no padding",
    "pad_to_multiple_of": "batches are padded to their longest sample, packed rows not at all",
    "completion_only_loss": "only gpt turns are learned, always",
    "assistant_only_loss": "only gpt turns are learned, always",
    "pad_token": "the checkpoint fixes it",
}
