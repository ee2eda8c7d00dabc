"""Settings of the module in release 0.1, as this release has them."""

from collections.abc import Mapping
from typing import Any

#: The settings of ``performance`` by their path among the module's arguments in release 0.1.
MOVED_SETTINGS = {
    "share_prompts": "share_prompts_in_learning",
    "recompute_logits": "recompute_logits",
    "rollout.share_prompts": "share_prompts_in_rollouts",
    "rollout.compaction": "compaction",
    "rollout.merge_adapter": "merge_adapter",
    "policy.fused_lora": "fused_lora",
    "policy.onednn": "onednn",
}


def upgraded(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Convert settings of the module from release 0.1, in a configuration or checkpoint, to this release.

    Args:
        settings: arguments of the module, as plain data. They are not changed.

    Example:
        >>> upgraded({"rollout": {"group_size": 8, "compaction": False}, "share_prompts": True})
        {'rollout': {'group_size': 8}, 'performance': {'share_prompts_in_learning': True, 'compaction': False}}
    """
    found = {name: dict(value) if isinstance(value, Mapping) else value for name, value in settings.items()}
    moved = {}
    for path, name in MOVED_SETTINGS.items():
        section, _, key = path.rpartition(".")
        owner = found.get(section) if section else found
        if isinstance(owner, dict) and key in owner:
            moved[name] = owner.pop(key)
    return found | ({"performance": moved | dict(found.get("performance") or {})} if moved else {})
