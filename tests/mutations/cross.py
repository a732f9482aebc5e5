TESTS = ("tests/model/test_model.py", "tests/model/test_cross.py", "tests/inputs/test_layout.py")
LAYOUT, CROSS, MODEL = "nvlm_runtime/inputs/layout.py", "nvlm_runtime/model/cross.py", "nvlm_runtime/model/model.py"
MUTATIONS = [
    (
        LAYOUT,
        "tag_spans.append((*block.tiles[source].tag, start, end_key))",
        "tag_spans.append((block.tiles[source].tag[0], block.tiles[source].tag[0] + 1, start, end_key))",
        "trap 28: only a tag's first token sees its tile alone",
    ),
    (LAYOUT, "return 0, self.cross_length", "return 0, 0", "trap 28: what is generated sees no image"),
    (
        CROSS,
        "torch.where(sees[..., None], self._feed_forward(self.ffn_norm(x)), 0)",
        "self._feed_forward(self.ffn_norm(x))",
        "trap 28: a row that sees nothing goes through the feed-forward",
    ),
    (
        MODEL,
        "pieces.append(self.language_model.embed_tokens(torch.tensor(piece, device=tiles.device)))",
        "pieces.append(self.language_model.embed_tokens(torch.tensor(piece, device=tiles.device)).detach())",
        "trap 29: tags in the keys have no gradient",
    ),
    (LAYOUT, 'if config.routing.tags == "cross" and tags[tile]:', "if False:", "trap 29: no tags in the keys"),
    (LAYOUT, '"regular": range(num_tiles - 1)', '"regular": range(num_tiles)', "NVLM-H's thumbnail is in the keys too"),
    (
        CROSS,
        "self.gate = nn.Parameter(torch.zeros(1))",
        "self.gate = nn.Parameter(torch.full((1,), 0.01))",
        "gates begin open",
    ),
    (
        CROSS,
        "x = gated_project(out.flatten(2), dense_weight(self.o_proj, x.dtype), x, self.gate, sees)",
        "x = x + self.gate * self.o_proj(out.flatten(2))",
        "a gate without tanh",
    ),
    (
        CROSS,
        "embeds = embeds + sinusoids(places, embeds.shape[-1]).to(embeds.dtype)",
        "pass",
        "no positions of the keys",
    ),
    (
        MODEL,
        "tokens.append(tiles[list(image.placeholder_tiles)].flatten(0, 1))",
        "tokens.append(tiles[list(image.placeholder_tiles)[::-1]].flatten(0, 1))",
        "tiles in the slots from the last to the first",
    ),
]
