"""Training where one memory ends: graphs over several processes, by torch's engines."""

from lora_fx.graph.sharded import on_first_process
from lora_fx.parallel.checkpoint_parts import load_sharded
from lora_fx.parallel.fsdp import fully_shard
from lora_fx.parallel.pipeline import inputs_of, stage_module
from lora_fx.parallel.sharding_plan import ShardingPlan
from lora_fx.parallel.tensor_parallel import shard

__all__ = ["ShardingPlan", "fully_shard", "inputs_of", "load_sharded", "on_first_process", "shard", "stage_module"]
