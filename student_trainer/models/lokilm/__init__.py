"""LokiLM's shape of student (arXiv 2407.07370) for `transformers`, which knows it once this is imported.

`modeling_lokilm` imports nothing of ours: a copy of it lies beside the weights of every student, for people without
this package.
"""

from transformers import AutoConfig, AutoModelForCausalLM

from potstill.student_trainer.models.lokilm.modeling_lokilm import LokiLMConfig, LokiLMForCausalLM

__all__ = ["LokiLMConfig", "LokiLMForCausalLM"]

LokiLMConfig.register_for_auto_class()
LokiLMForCausalLM.register_for_auto_class("AutoModelForCausalLM")
# Once more where the package was loaded a second time.
AutoConfig.register(LokiLMConfig.model_type, LokiLMConfig, exist_ok=True)
AutoModelForCausalLM.register(LokiLMConfig, LokiLMForCausalLM, exist_ok=True)
