"""Words and sentence patterns of the documents that `facts` writes. Nothing but lists; written for this project."""

from __future__ import annotations

NUMBER_ATTRIBUTES = (
    "access code", "account number", "badge number", "case number", "customer number", "door code", "file number",
    "invoice number", "licence number", "locker number", "member number", "order number", "pin code", "room number",
    "serial number", "vault code",
)  # fmt: skip
WORD_ATTRIBUTES = ("code name", "password", "project name", "secret word")

FIRST_NAMES = (
    "Ada", "Agnes", "Alan", "Albert", "Alma", "Amir", "Anders", "Anita", "Anton", "Astrid", "August", "Beatrice",
    "Benno", "Bianca", "Boris", "Brenda", "Bruno", "Camille", "Carlos", "Carmen", "Cecilia", "Chen", "Clive", "Cora",
    "Cyrus", "Dagmar", "Damian", "Daphne", "Dario", "Delia", "Denise", "Dmitri", "Dora", "Duncan", "Edith", "Edgar",
    "Elena", "Elias", "Elsa", "Emil", "Enzo", "Erika", "Esther", "Eugene", "Eva", "Fabian", "Farid", "Felix", "Flora",
    "Frances", "Frank", "Freya", "Gabriel", "Gemma", "Gerald", "Gilda", "Gloria", "Grace", "Gustav", "Hanna", "Harold",
    "Hazel", "Hector", "Helga", "Hilda", "Howard", "Ida", "Igor", "Imran", "Ines", "Irene", "Isaac", "Ivy", "Jacob",
    "Jamila", "Janet", "Jasper", "Joan", "Jorge", "Judith", "Julian", "Karim", "Karin", "Keith", "Klara", "Klaus",
    "Lars", "Laura", "Leo", "Leonie", "Lionel", "Lorenzo", "Louise", "Lucia", "Lydia", "Magnus", "Malik", "Manuel",
    "Margot", "Martin", "Matilda", "Maya", "Mei", "Miles", "Mira", "Monica", "Morris", "Nadine", "Nathan", "Nelson",
    "Nina", "Norma", "Odette", "Oleg", "Olive", "Omar", "Otto", "Pablo", "Paula", "Pedro", "Petra", "Philip", "Quentin",
    "Rafael", "Ramona", "Raymond", "Renata", "Rhoda", "Rita", "Robin", "Roland", "Rosa", "Rufus", "Ruth", "Sabine",
    "Salim", "Sandra", "Selma", "Simon", "Sofia", "Stefan", "Stella", "Sven", "Tamara", "Tariq", "Teresa", "Theo",
    "Thora", "Tilda", "Tobias", "Ulrich", "Ursula", "Valerie", "Vera", "Viktor", "Vivian", "Walter", "Wanda", "Wendy",
    "Wilfred", "Willa", "Xenia", "Yara", "Yuri", "Zelda",
)  # fmt: skip

LAST_NAMES = (
    "Abbott", "Acosta", "Ahlgren", "Alvarez", "Ansari", "Archer", "Aubert", "Bader", "Banks", "Barlow", "Bauer",
    "Bennett", "Bianchi", "Blake", "Bohm", "Booth", "Brandt", "Brooks", "Burke", "Caldwell", "Carver", "Castro",
    "Chang", "Clarke", "Conti", "Costa", "Crane", "Cruz", "Dalton", "Danner", "Delgado", "Desai", "Dixon", "Doyle",
    "Drake", "Duarte", "Eklund", "Elliott", "Engels", "Everett", "Falk", "Farrell", "Faure", "Fischer", "Fletcher",
    "Flores", "Forster", "Fuchs", "Galvin", "Garner", "Gibbs", "Gomez", "Graf", "Greene", "Haas", "Haddad", "Hagen",
    "Hale", "Hartman", "Hobbs", "Holt", "Horvath", "Hughes", "Hunt", "Ibarra", "Ishida", "Jansen", "Jensen", "Joshi",
    "Kaiser", "Kaplan", "Keane", "Keita", "Kemp", "Khalil", "Klein", "Knox", "Koch", "Kovacs", "Kraus", "Lamb", "Lange",
    "Larsen", "Leroy", "Lindholm", "Lopez", "Lowe", "Lund", "Madsen", "Maier", "Malone", "Marchetti", "Marsh", "Mbeki",
    "Medina", "Mercer", "Miles", "Moreau", "Morgan", "Moser", "Nagy", "Nash", "Navarro", "Neumann", "Novak", "Nyman",
    "Oakley", "Oduya", "Ortega", "Osborne", "Palmer", "Park", "Pavlov", "Pereira", "Petit", "Pike", "Popov", "Porter",
    "Quinn", "Ramsey", "Reyes", "Ricci", "Rossi", "Rowe", "Salazar", "Sanders", "Saito", "Schmid", "Serrano", "Shaw",
    "Silva", "Skinner", "Slater", "Soto", "Spencer", "Stark", "Stone", "Sutton", "Tanaka", "Thorne", "Torres", "Tran",
    "Tucker", "Ueda", "Vance", "Varga", "Vargas", "Vogel", "Wagner", "Walsh", "Warren", "Weber", "Weiss", "Whitaker",
    "Wolf", "Wright", "Yates", "Yilmaz", "York", "Zeller", "Zhou", "Zimmer",
)  # fmt: skip

SYLLABLES = (
    "ba", "bel", "bor", "ca", "cor", "da", "del", "dor", "du", "fa", "fen", "fir", "ga", "gan", "gor", "ha", "hel",
    "jo", "ka", "kel", "kir", "ko", "la", "lin", "lo", "lu", "ma", "mar", "mi", "mon", "na", "nel", "nor", "nu", "pa",
    "per", "pol", "ra", "ren", "rin", "ro", "sa", "sel", "shi", "sol", "ta", "tan", "ter", "to", "tul", "va", "ven",
    "vi", "vor", "wa", "win", "ya", "yol", "za", "zen",
)  # fmt: skip

VALUE_ADJECTIVES = (
    "amber", "ancient", "arctic", "azure", "bitter", "brave", "bronze", "calm", "coral", "crimson", "crystal", "dark",
    "early", "eastern", "emerald", "fierce", "floating", "frozen", "gentle", "golden", "green", "hidden", "hollow",
    "humble", "indigo", "inner", "iron", "ivory", "lonely", "lunar", "marble", "misty", "nimble", "northern", "orange",
    "outer", "pale", "polar", "proud", "purple", "quiet", "rapid", "royal", "scarlet", "secret", "silent", "silver",
    "solar", "southern", "steady", "stormy", "sunny", "swift", "velvet", "violet", "western", "wild", "winter", "wise",
    "yellow",
)  # fmt: skip
VALUE_NOUNS = (
    "anchor", "arrow", "badger", "beacon", "bear", "bridge", "candle", "canyon", "castle", "cedar", "cloud", "comet",
    "compass", "condor", "crown", "desert", "dolphin", "dragon", "eagle", "ember", "falcon", "feather", "forest", "fox",
    "garden", "glacier", "hammer", "harbor", "hawk", "heron", "island", "jaguar", "kettle", "lantern", "lion", "maple",
    "meadow", "mirror", "moon", "mountain", "ocean", "orchid", "otter", "owl", "panther", "pebble", "pine", "planet",
    "raven", "river", "rocket", "saddle", "shadow", "shield", "spider", "star", "temple", "thunder", "tiger", "tower",
    "valley", "whale", "willow", "wolf",
)  # fmt: skip

PEOPLE = (
    "accountant", "architect", "baker", "beekeeper", "blacksmith", "bookseller", "brewer", "captain", "caretaker",
    "chemist", "clerk", "cook", "dentist", "driver", "electrician", "farmer", "ferryman", "fiddler", "florist",
    "forester", "goldsmith", "guard", "guide", "innkeeper", "janitor", "judge", "lawyer", "librarian", "mayor",
    "mechanic", "miller", "nurse", "painter", "pharmacist", "plumber", "potter", "printer", "sailor", "shepherd",
    "shoemaker", "student", "surveyor", "teacher", "translator", "waiter", "watchmaker", "weaver", "welder",
)  # fmt: skip
GROUPS = (
    "archive team", "brass band", "building committee", "chess club", "choir", "city office", "fire brigade",
    "history society", "morning shift", "neighbours", "night shift", "owners", "parish council", "research group",
    "rowing club", "school class", "ticket office", "tourists", "visitors", "volunteers",
)  # fmt: skip
PLACES = (
    "abbey", "airfield", "arcade", "attic", "barn", "bathhouse", "boathouse", "brewery", "canal", "chapel", "cinema",
    "cottage", "courthouse", "dairy", "depot", "farmhouse", "ferry pier", "foundry", "gallery", "greenhouse",
    "gym", "hospital", "inn", "laboratory", "laundry", "mill", "monastery", "observatory", "orchard", "park",
    "pharmacy", "post office", "quarry", "reading room", "restaurant", "sawmill", "shipyard", "stable", "stadium",
    "swimming pool", "tavern", "town hall", "vineyard", "warehouse", "watchtower", "windmill", "wine cellar", "zoo",
)  # fmt: skip
AREAS = (
    "behind the hedge", "beside the canal", "beyond the hills", "by the old wall", "close to the border",
    "in the east wing", "in the lower town", "near the crossroads", "near the lake", "next to the park",
    "on the north bank", "on the outskirts", "on the upper floor", "opposite the church", "outside the gates",
    "under the arches",
)  # fmt: skip
THINGS = (
    "account books", "bicycle racks", "blue curtains", "brass keys", "carved chairs", "clay pots", "coat hooks",
    "fishing nets", "flower boxes", "folding ladders", "fruit baskets", "garden tools", "glass panes", "grain sacks",
    "hand pumps", "heavy boxes", "ink bottles", "kitchen scales", "lamp posts", "leather bags", "letter boxes",
    "milk cans", "music stands", "oak doors", "oil lamps", "paper rolls", "picture frames", "rain barrels",
    "road signs", "rope ladders", "sail cloth", "shop signs", "signal flags", "stone steps", "street maps",
    "tea cups", "train tickets", "water pipes", "window frames", "wool blankets",
)  # fmt: skip
ADJECTIVES = (
    "abandoned", "beautiful", "broad", "comfortable", "crooked", "crowded", "damp", "draughty", "elegant", "familiar",
    "faded", "fashionable", "hidden", "little", "lively", "lonely", "modest", "neglected", "new", "peaceful",
    "plain", "polished", "remote", "restored", "rural", "shabby", "shaded", "small", "solid", "spacious", "splendid",
    "sturdy", "sunny", "tidy", "unusual", "vast", "well-kept", "wooden",
)  # fmt: skip
PAST_VERBS = (
    "admired", "arranged", "assembled", "borrowed", "carried away", "catalogued", "checked", "cleaned", "counted",
    "covered", "delivered", "described", "exchanged", "fetched", "fixed", "gathered", "hid", "inspected", "labelled",
    "lost", "measured", "moved", "noticed", "ordered", "painted", "polished", "put away", "repaired", "replaced",
    "returned", "sold", "sorted", "stacked", "unpacked", "washed", "weighed",
)  # fmt: skip
TIMES = (
    "after the concert", "all afternoon", "around midday", "at dawn", "at the end of the month", "before breakfast",
    "before the first snow", "between two meetings", "during the holidays", "during the long strike",
    "earlier that week", "every other Monday", "from time to time", "in early spring", "in the first week of June",
    "in the late evening", "last autumn", "on a rainy Tuesday", "on market day", "once a year", "one Sunday",
    "over the winter", "shortly before noon", "that same night", "the day before", "towards evening", "two years ago",
    "within a few hours",
)  # fmt: skip
WEATHERS = (
    "a cold wind blew", "fog covered the valley", "it rained without a break", "it was unusually warm",
    "snow lay on the roofs", "the roads were icy", "the sky cleared", "the sun came out", "the water rose",
    "thunder rolled over the hills",
)  # fmt: skip
DISHES = (
    "apple cake", "barley soup", "black bread", "fried fish", "goat cheese", "lentil stew", "mushroom pie",
    "onion soup", "pea soup", "pickled herring", "plum jam", "roast chestnuts",
)  # fmt: skip

# Sentences that state nothing anybody is asked about. Slots in braces; {n}, {m}: numbers below 1000, {year}: a year.
PATTERNS = (
    "The {person} and the {person2} {did} the {things} {when}.",
    "{When}, the {group} {did} the {things} of the {place}.",
    "The {place} {area} is {adj}, while the one {area2} is {adj2}.",
    "Between the {place} and the {place2} there are {n} steps.",
    "The {group} needed {n} days for the {things}.",
    "A {adj} {place} was built {area} in {year}.",
    "The {place} was closed from {year} to {year2} for repairs.",
    "{When}, {weather}, and the {person} went to the {place}.",
    "The {person} never liked the {adj} {place} {area}.",
    "Whoever passes the {place} can see the {things} of the {group}.",
    "{When} {weather}.",
    "The menu of the {place} offers {dish} and {dish2}.",
    "For {dish}, the {person} always walked to the {place} {area}.",
    "There is room for {n} people in the {adj} {place}.",
    "The {things} were heavier than the {person} had thought.",
    "According to the {person2}, nobody {did} the {things} {when}.",
    "A bus leaves for the {place} every {n} minutes.",
    "The {group} met the {person} {area} and talked about the {things}.",
    "It is said that the {place} was once a {adj} {place2}.",
    "The {person} showed the {adj} {place} to {n} guests.",
    "Only {n} of the {m} {things} were still in the {place}.",
    "The {person} wrote {n} pages about the {things}.",
    "{When}, the price of {dish} rose by {n} percent.",
    "Why the {person} {did} the {things} is still unknown.",
    "The {things} came from a {adj} {place} {area}.",
    "The {place} has a {adj} front and a {adj2} back.",
    "If {weather}, the {place} stays closed.",
    "The {group} voted for a {adj} {place} and against a {adj2} one.",
    "Some of the {things} were {adj}, others {adj2}.",
    "The {person} asked the {person2} whether the {place} was open.",
    "Children are welcome in the {place}, dogs in the {place2}.",
    "The walls of the {place} are {n} centimetres thick.",
    "After {n} letters the {person} gave up.",
    "The {place2} is the third building after the {place}.",
    "In {year}, the {group} {did} the {things} and {did2} the rest.",
    "Every guest of the {place} gets {dish} for free.",
)  # fmt: skip
# The same, about somebody by name.
PERSON_PATTERNS = (
    "{name} {did} the {things} {when}.",
    "{When}, {name} met {name2} {area}.",
    "{name} works in the {adj} {place} {area}.",
    "{name} and the {person} {did} the {things} together.",
    "The {person} had a long talk with {name} about {dish}.",
    "{name} paid {n} coins for the {things}.",
    "Nobody told {name} that the {place} was {adj}.",
    "A parcel for {name} was left in the {place}.",
    "{name} was born {area} and moved away in {year}.",
    "Last week {name} cooked {dish} for {name2}.",
)

FACT_PATTERNS = (
    "The {attribute} of {entity} is {value}.",
    "{entity} has the {attribute} {value}.",
    "For {entity}, the {attribute} is {value}.",
    "Remember that the {attribute} of {entity} is {value}.",
    "As noted before, the {attribute} of {entity} is {value}.",
)
SECTION_PATTERNS = (
    "This section is about {entity}.",
    "The next part is about {entity}.",
    "What follows is about {entity}.",
)
SECTION_FACT_PATTERNS = (
    "Their {attribute} is {value}.",
    "Remember that their {attribute} is {value}.",
    "As noted before, their {attribute} is {value}.",
)
