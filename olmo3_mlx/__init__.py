"""olmo3-mlx: Ai2's Olmo 3 on Apple silicon, in Python on MLX.

from olmo3_mlx import load, generate
model, tokenizer = load("demo")
print(generate(model, tokenizer, "How many layers does Olmo 3 7B have?").text)
"""

from olmo3_mlx.caches.cache import rewind
from olmo3_mlx.caches.growing import KVCache
from olmo3_mlx.caches.options import CacheOptions
from olmo3_mlx.caches.rotating import RotatingKVCache
from olmo3_mlx.checkpoints.checkpoint import Checkpoint, load
from olmo3_mlx.config import GenerationConfig, Olmo3Config, RopeConfig
from olmo3_mlx.conversation.chat import Chat
from olmo3_mlx.conversation.completion import Completion, generate, stream
from olmo3_mlx.conversation.listing import (
    ConversationSummary,
    list_conversations,
    remove_conversation,
)
from olmo3_mlx.conversation.saved import SavedConversation, open_conversation
from olmo3_mlx.errors import (
    CacheError,
    CachesNotSavedError,
    CheckpointError,
    ConfigError,
    ConvertError,
    HubError,
    MemoryFitError,
    NoTemplateError,
    Olmo3Error,
    OptionError,
    OtherCachesError,
    PromptError,
    SessionError,
    TemplateError,
    TokenizerError,
    UnknownNameError,
    UnknownRevisionError,
)
from olmo3_mlx.model import Olmo3
from olmo3_mlx.sessions.session import Session
from olmo3_mlx.text.tokenizer import Tokenizer

__version__ = "0.1.0"

__all__ = [
    "CacheError",
    "CacheOptions",
    "CachesNotSavedError",
    "Chat",
    "Checkpoint",
    "CheckpointError",
    "Completion",
    "ConfigError",
    "ConversationSummary",
    "ConvertError",
    "GenerationConfig",
    "HubError",
    "KVCache",
    "MemoryFitError",
    "NoTemplateError",
    "Olmo3",
    "Olmo3Config",
    "Olmo3Error",
    "OptionError",
    "OtherCachesError",
    "PromptError",
    "RopeConfig",
    "RotatingKVCache",
    "SavedConversation",
    "Session",
    "SessionError",
    "TemplateError",
    "Tokenizer",
    "TokenizerError",
    "UnknownNameError",
    "UnknownRevisionError",
    "generate",
    "list_conversations",
    "load",
    "open_conversation",
    "remove_conversation",
    "rewind",
    "stream",
]
