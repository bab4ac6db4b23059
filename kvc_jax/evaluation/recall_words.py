"""Words of the recall tasks. The tokenizer that `scripts/train_recall.py` makes has one token for each."""

ADJECTIVES = (
    "amber", "ancient", "brave", "bright", "broken", "calm", "clever", "cold", "crimson", "curious", "dusty", "eager",
    "faint", "fierce", "gentle", "golden", "grand", "hollow", "humble", "idle", "ivory", "jolly", "keen", "lonely",
    "lucky", "mighty", "modest", "narrow", "noble", "pale", "patient", "plain", "proud", "quiet", "rapid", "restless",
    "royal", "rusty", "secret", "shallow", "silent", "silver", "simple", "sleepy", "solemn", "stubborn", "sturdy",
    "subtle", "swift", "tender", "timid", "velvet", "vivid", "weary", "wild", "wooden")

NOUNS = (
    "anchor", "arrow", "avenue", "balcony", "basket", "beacon", "bottle", "bridge", "button", "cabin", "candle",
    "canyon", "captain", "carriage", "castle", "cellar", "chapel", "compass", "corner", "cottage", "cradle",
    "curtain", "dagger", "desert", "engine", "fountain", "garden", "gate", "harbour", "hammer", "island", "jewel",
    "kettle", "key", "ladder", "lantern", "letter", "lighthouse", "market", "meadow", "mill", "mirror", "mountain",
    "needle", "orchard", "palace", "parcel", "pillar", "pocket", "puzzle", "river", "saddle", "sailor", "school",
    "shadow", "shelter", "signal", "spindle", "station", "statue", "temple", "theatre", "thunder", "ticket", "tower",
    "trumpet", "tunnel", "valley", "vessel", "village", "violin", "wagon", "wharf", "whistle", "window", "wizard")

NAMES = tuple(
    first + vowel + last
    for first, last in zip("BDFGJKLMPRSTVWXZ", "XKZVQMWBGDPJRLTK", strict=True) for vowel in "AEOU")
"""Of variables: capitals that no text has."""

LABELS = (
    "alpha", "beta", "gamma", "delta", "sigma", "omega", "kappa", "lambda", "theta", "zeta", "epsilon", "upsilon")

CATEGORIES = tuple(tuple(line.split()) for line in """
horse dog cat wolf bear lion tiger sheep goat cow pig fox rabbit monkey eagle owl
red blue green yellow black white brown purple orange pink grey scarlet violet azure olive beige
bread cheese butter milk honey sugar soup beef ham rice cake pie egg apple pear plum
arm leg foot hand knee elbow shoulder neck chin nose ear mouth eye thumb wrist ankle
father mother brother sister uncle aunt cousin nephew niece son daughter husband wife widow grandson twin
rain snow wind storm fog frost hail cloud mist breeze gale ice drizzle sunshine lightning flood
""".strip().splitlines())
"""What the few-shot labels stand for: animals, colours, food, the body, kin, weather."""

SUBJECTS = ("magic number", "secret code", "locker number", "ticket number", "access code", "lucky number")
ORDINALS = ("one", "two", "three", "four")
