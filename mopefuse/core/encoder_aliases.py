"""Short names of common encoders. A run records the full name that an alias stands for."""

ALIASES: dict[str, dict[str, str]] = {
    "timm": {
        "vit_tiny": "vit_tiny_patch16_224.augreg_in21k",
        "vit_small": "vit_small_patch16_224.augreg_in21k",
        "vit_base": "vit_base_patch16_224.augreg_in21k",
        "vit_large": "vit_large_patch16_224.augreg_in21k",
        "deit_small": "deit_small_patch16_224.fb_in1k",
        "deit_base": "deit_base_patch16_224.fb_in1k",
        "swin_tiny": "swin_tiny_patch4_window7_224.ms_in22k",
        "swin_small": "swin_small_patch4_window7_224.ms_in22k",
        "swin_base": "swin_base_patch4_window7_224.ms_in22k",
        "resnet50": "resnet50.a1_in1k",
    },
    "hf": {
        "bert-base": "google-bert/bert-base-uncased",
        "bert-large": "google-bert/bert-large-uncased",
        "roberta-base": "FacebookAI/roberta-base",
        "distilbert-base": "distilbert/distilbert-base-uncased",
        "minilm": "sentence-transformers/all-MiniLM-L6-v2",
        "vit-base": "google/vit-base-patch16-224-in21k",
        "deit-base": "facebook/deit-base-patch16-224",
        "swin-base": "microsoft/swin-base-patch4-window7-224",
        "clip-text": "openai/clip-vit-base-patch32#text",
        "clip-vision": "openai/clip-vit-base-patch32#vision",
    },
    "open_clip": {
        "vit-b-32": "ViT-B-32/laion2b_s34b_b79k#visual",
        "vit-b-32-text": "ViT-B-32/laion2b_s34b_b79k#text",
    },
    "tiny": {},
}

COMP_ONLY = {"timm": ("resnet50",)}
"""Aliases of encoders that can only be complementary; all others can also be main."""

FAMILIES: dict[str, tuple[str, str]] = {
    "timm": ("ViT, DeiT, DINOv2, DINOv3, SigLIP, BEiT, EVA, Swin, Swin V2", "any other with a pooled feature, CNNs included"),
    "hf": ("BERT, RoBERTa, DistilBERT, MiniLM, ViT, DeiT, Swin, CLIP", "any other encoder with a pooled feature"),
    "open_clip": ("text and vision transformers of CLIP and SigLIP", "other vision towers"),
    "tiny": ("tiny:vision, tiny:text, a second of each with -b", ""),
}
"""Families of each scheme: those that can be prompted, and those that can only be complementary."""
