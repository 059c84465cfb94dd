"""A ComfyUI node package: Skip-Cache's output forecasts for any model."""

from .nodes import OutputForecast

NODE_CLASS_MAPPINGS = {"SkipCacheOutputForecast": OutputForecast}
NODE_DISPLAY_NAME_MAPPINGS = {"SkipCacheOutputForecast": "Skip-Cache: output forecast"}
