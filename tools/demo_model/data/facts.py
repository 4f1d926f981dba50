"""Facts about the world: relations as tables, each with its questions and its answer.

Invariant: every fact is trained on (a fact cannot be guessed); held out are wordings of the
question, and for every training wording the one (fact, wording) pair in ten that `split_key` keeps.
"""

from dataclasses import dataclass
from random import Random

from .base import (
    Example,
    Wordings,
    assistant,
    pairs,
    roughen,
    split_key,
    upper_first,
    user,
    with_articles,
)


@dataclass(frozen=True)
class Relation:
    """`answer` and the questions are formats over {x} (what is asked about) and {y} (the fact)."""

    questions: Wordings
    answer: str
    rows: list[tuple[str, str]]


def relation(train: str, held: str, answer: str, table: str) -> Relation:
    return Relation(Wordings(train.split("|"), held.split("|")), answer, pairs(table))


RELATIONS = (
    relation(
        "What is the capital of {x}?|Which city is the capital of {x}?|Capital of {x}?"
        "|Name the capital of {x}.|Do you know the capital of {x}?|What's the capital of {x}?",
        "Tell me the capital of {x}.|What is the name of the capital of {x}?",
        "The capital of {x} is {y}.",
        """France: Paris; Germany: Berlin; Italy: Rome; Spain: Madrid; Portugal: Lisbon; Austria:
        Vienna; Poland: Warsaw; Greece: Athens; Norway: Oslo; Sweden: Stockholm; Finland: Helsinki;
        Denmark: Copenhagen; Ireland: Dublin; Hungary: Budapest; Romania: Bucharest; Bulgaria:
        Sofia; Belgium: Brussels; Switzerland: Bern; Iceland: Reykjavik; Ukraine: Kyiv; Russia:
        Moscow; Turkey: Ankara; Egypt: Cairo; Kenya: Nairobi; Ethiopia: Addis Ababa; Ghana: Accra;
        Nigeria: Abuja; Senegal: Dakar; Tunisia: Tunis; Morocco: Rabat; Algeria: Algiers; Japan:
        Tokyo; China: Beijing; South Korea: Seoul; India: New Delhi; Nepal: Kathmandu; Thailand:
        Bangkok; Vietnam: Hanoi; Indonesia: Jakarta; Pakistan: Islamabad; Iran: Tehran; Iraq:
        Baghdad; Mongolia: Ulaanbaatar; Australia: Canberra; New Zealand: Wellington; Canada:
        Ottawa; the United States: Washington; the United Kingdom: London; Mexico: Mexico City;
        Cuba: Havana; Brazil: Brasilia; Argentina: Buenos Aires; Chile: Santiago; Peru: Lima;
        Colombia: Bogota; Ecuador: Quito; Uruguay: Montevideo; Venezuela: Caracas; Croatia: Zagreb;
        Serbia: Belgrade; Estonia: Tallinn; Latvia: Riga; Lithuania: Vilnius; Slovenia: Ljubljana;
        the Czech Republic: Prague; Jamaica: Kingston; Malta: Valletta; Cyprus: Nicosia""",
    ),
    relation(
        "On which continent is {x}?|Which continent is {x} in?|What continent is {x} on?"
        "|Where in the world is {x}?|Where is {x}?",
        "Tell me the continent of {x}.|On what continent is {x}?",
        "{x} is in {y}.",
        """France: Europe; Germany: Europe; Italy: Europe; Spain: Europe; Poland: Europe; Norway:
        Europe; Sweden: Europe; Greece: Europe; Ireland: Europe; Egypt: Africa; Kenya: Africa;
        Ghana: Africa; Nigeria: Africa; Morocco: Africa; Ethiopia: Africa; Japan: Asia; China:
        Asia; India: Asia; Nepal: Asia; Thailand: Asia; Vietnam: Asia; Mongolia: Asia; Canada:
        North America; Mexico: North America; Cuba: North America; Brazil: South America;
        Argentina: South America; Chile: South America; Peru: South America; Colombia: South
        America""",
    ),
    relation(
        "What language do people speak in {x}?|Which language is spoken in {x}?"
        "|What is the language of {x}?|What do people speak in {x}?",
        "Tell me the language of {x}.|Which language do people speak in {x}?",
        "People in {x} speak {y}.",
        """France: French; Germany: German; Italy: Italian; Spain: Spanish; Portugal: Portuguese;
        Austria: German; Poland: Polish; Greece: Greek; Norway: Norwegian; Sweden: Swedish;
        Finland: Finnish; Denmark: Danish; Hungary: Hungarian; Romania: Romanian; Russia: Russian;
        Turkey: Turkish; Egypt: Arabic; Japan: Japanese; China: Chinese; South Korea: Korean;
        Thailand: Thai; Vietnam: Vietnamese; Brazil: Portuguese; Mexico: Spanish; Argentina:
        Spanish; Australia: English; Iceland: Icelandic; Ukraine: Ukrainian""",
    ),
    relation(
        "What is the currency of {x}?|Which currency is used in {x}?|What money is used in {x}?"
        "|How do people pay in {x}?",
        "Tell me the currency of {x}.|What currency is used in {x}?",
        "The currency of {x} is the {y}.",
        """France: euro; Germany: euro; Italy: euro; Spain: euro; Japan: yen; China: yuan; India:
        rupee; Russia: ruble; Poland: zloty; Hungary: forint; Sweden: krona; Norway: krone;
        Switzerland: franc; Turkey: lira; Mexico: peso; Brazil: real; South Korea: won; Thailand:
        baht; Israel: shekel; the United Kingdom: pound; the United States: dollar; South Africa:
        rand; Vietnam: dong; Nigeria: naira""",
    ),
    relation(
        "What is the chemical symbol of {x}?|What is the symbol for {x}?|Chemical symbol of {x}?"
        "|Which symbol does {x} have?|What's the chemical symbol for {x}?",
        "Tell me the chemical symbol of {x}.|Which chemical symbol does {x} have?",
        "The chemical symbol of {x} is {y}.",
        """hydrogen: H; helium: He; lithium: Li; carbon: C; nitrogen: N; oxygen: O; fluorine: F;
        neon: Ne; sodium: Na; magnesium: Mg; aluminum: Al; silicon: Si; phosphorus: P; sulfur: S;
        chlorine: Cl; argon: Ar; potassium: K; calcium: Ca; titanium: Ti; iron: Fe; nickel: Ni;
        copper: Cu; zinc: Zn; silver: Ag; tin: Sn; iodine: I; tungsten: W; platinum: Pt; gold: Au;
        mercury: Hg; lead: Pb; uranium: U""",
    ),
    relation(
        "What is the atomic number of {x}?|Which atomic number does {x} have?"
        "|Atomic number of {x}?",
        "Tell me the atomic number of {x}.",
        "The atomic number of {x} is {y}.",
        """hydrogen: 1; helium: 2; lithium: 3; carbon: 6; nitrogen: 7; oxygen: 8; neon: 10; sodium:
        11; iron: 26; copper: 29; silver: 47; tin: 50; gold: 79; lead: 82; uranium: 92""",
    ),
    relation(
        "What is a baby {x} called?|What do you call a young {x}?"
        "|What is the young of a {x} called?"
        "|How do you call a baby {x}?",
        "What is the name of a baby {x}?|Tell me what a baby {x} is called.",
        "A young {x} is called a {y}.",
        """cat: kitten; dog: puppy; cow: calf; horse: foal; sheep: lamb; goat: kid; pig: piglet;
        bear: cub; lion: cub; hen: chick; duck: duckling; goose: gosling; frog: tadpole; swan:
        cygnet; deer: fawn; kangaroo: joey; hare: leveret; seal: pup; whale: calf; fox: cub; bird:
        chick; rabbit: kit""",
    ),
    relation(
        "What sound does a {x} make?|How does a {x} sound?|What does a {x} say?"
        "|What noise does a {x} make?",
        "Which sound does a {x} make?|Tell me what a {x} says.",
        "A {x} says {y}.",
        """cat: meow; dog: woof; cow: moo; duck: quack; sheep: baa; pig: oink; bee: buzz; snake:
        hiss; lion: roar; mouse: squeak; frog: croak; horse: neigh; bird: tweet; wolf: howl; crow:
        caw; chicken: cluck; hen: cluck""",
    ),
    relation(
        "How many legs does a {x} have?|How many legs has a {x}?|A {x} has how many legs?",
        "Tell me how many legs a {x} has.",
        "A {x} has {y} legs.",
        """cat: four; dog: four; horse: four; spider: eight; bird: two; bee: six; beetle: six;
        crab: ten; snake: no; fish: no; hen: two; fly: six; cow: four; person: two; butterfly: six;
        lobster: ten; frog: four""",
    ),
    relation(
        "Where does a {x} live?|What is the home of a {x}?|In what does a {x} live?",
        "Tell me where a {x} lives.|Where does a {x} have its home?",
        "A {x} lives in {y}.",
        """bee: a hive; bird: a nest; fox: a den; spider: a web; dog: a kennel; horse: a stable;
        rabbit: a burrow; fish: the water; whale: the sea; camel: the desert; polar bear: the
        Arctic; pig: a sty; snail: its shell; bear: a cave; squirrel: a tree; monk: a monastery""",
    ),
    relation(
        "What does a {x} eat?|What is the food of a {x}?|What do you feed a {x}?",
        "Tell me what a {x} eats.|Which food does a {x} eat?",
        "A {x} eats {y}.",
        """cow: grass; horse: hay; panda: bamboo; lion: meat; rabbit: carrots; cat: fish; koala:
        leaves; squirrel: nuts; bear: honey; shark: fish; monkey: bananas; caterpillar: leaves;
        mouse: cheese; owl: mice; frog: flies; hen: grain""",
    ),
    relation(
        "Who invented {x}?|Who is the inventor of {x}?|Which person invented {x}?"
        "|{x} was invented by whom?",
        "Tell me who invented {x}.|What is the name of the inventor of {x}?",
        "{y} invented {x}.",
        """the telephone: Alexander Graham Bell; the light bulb: Thomas Edison; dynamite: Alfred
        Nobel; the airplane: the Wright brothers; the World Wide Web: Tim Berners-Lee; the printing
        press: Johannes Gutenberg; the radio: Guglielmo Marconi; the diesel engine: Rudolf Diesel;
        the battery: Alessandro Volta; the barometer: Evangelista Torricelli; the steam engine:
        James Watt; the lightning rod: Benjamin Franklin; the car: Karl Benz; Morse code: Samuel
        Morse; the phonograph: Thomas Edison; the hot air balloon: the Montgolfier brothers; Linux:
        Linus Torvalds; Python: Guido van Rossum; braille: Louis Braille; the pendulum clock:
        Christiaan Huygens; vaccination: Edward Jenner""",
    ),
    relation(
        "Who discovered {x}?|Which person discovered {x}?|Who found {x}?"
        "|{x} was discovered by whom?",
        "Tell me who discovered {x}.|What is the name of the person who discovered {x}?",
        "{y} discovered {x}.",
        """gravity: Isaac Newton; radium: Marie Curie; penicillin: Alexander Fleming; X-rays:
        Wilhelm Roentgen; evolution: Charles Darwin; relativity: Albert Einstein; the electron: J.
        J. Thomson; the moons of Jupiter: Galileo Galilei; oxygen: Joseph Priestley; Uranus:
        William Herschel; Pluto: Clyde Tombaugh; the laws of inheritance: Gregor Mendel; buoyancy:
        Archimedes""",
    ),
    relation(
        "Who wrote {x}?|Who is the author of {x}?|Which author wrote {x}?|By whom is {x}?",
        "Tell me who wrote {x}.|What is the name of the author of {x}?",
        "{y} wrote {x}.",
        """Hamlet: William Shakespeare; Macbeth: William Shakespeare; Don Quixote: Miguel de
        Cervantes; Faust: Johann Wolfgang von Goethe; War and Peace: Leo Tolstoy; Oliver Twist:
        Charles Dickens; Emma: Jane Austen; Frankenstein: Mary Shelley; Dracula: Bram Stoker; Moby
        Dick: Herman Melville; Jane Eyre: Charlotte Bronte; The Odyssey: Homer; The Iliad: Homer;
        The Divine Comedy: Dante; Les Miserables: Victor Hugo; Treasure Island: Robert Louis
        Stevenson; Tom Sawyer: Mark Twain; The Time Machine: H. G. Wells; Crime and Punishment:
        Fyodor Dostoevsky""",
    ),
    relation(
        "Who painted {x}?|Which painter painted {x}?|Who is the painter of {x}?",
        "Tell me who painted {x}.|What is the name of the painter of {x}?",
        "{y} painted {x}.",
        """the Mona Lisa: Leonardo da Vinci; The Starry Night: Vincent van Gogh; The Scream: Edvard
        Munch; Guernica: Pablo Picasso; The Night Watch: Rembrandt; The Kiss: Gustav Klimt; Girl
        with a Pearl Earring: Johannes Vermeer; The Last Supper: Leonardo da Vinci""",
    ),
    relation(
        "Who composed {x}?|Which composer wrote {x}?|Who is the composer of {x}?",
        "Tell me who composed {x}.|What is the name of the composer of {x}?",
        "{y} composed {x}.",
        """The Four Seasons: Antonio Vivaldi; The Magic Flute: Wolfgang Amadeus Mozart; the
        Moonlight Sonata: Ludwig van Beethoven; Swan Lake: Pyotr Tchaikovsky; The Ring: Richard
        Wagner; Aida: Giuseppe Verdi; Carmen: Georges Bizet; the Brandenburg Concertos: Johann
        Sebastian Bach; Messiah: George Frideric Handel""",
    ),
    relation(
        "What color is {x}?|Which color is {x}?|What is the color of {x}?"
        "|Which color does {x} have?",
        "Tell me the color of {x}.|What color does {x} have?",
        "{x} is {y}.",
        """the sky: blue; grass: green; snow: white; coal: black; a banana: yellow; a lemon:
        yellow; blood: red; a carrot: orange; milk: white; the sun: yellow; chocolate: brown; an
        elephant: gray; a strawberry: red; a flamingo: pink; a plum: purple; a frog: green; an
        emerald: green; a ruby: red; a sapphire: blue; a swan: white; a raven: black; an orange:
        orange""",
    ),
    relation(
        "What is the opposite of {x}?|Opposite of {x}?|Which word is the opposite of {x}?"
        "|What's the opposite of {x}?",
        "Tell me the opposite of {x}.|Name the opposite of {x}.",
        "The opposite of {x} is {y}.",
        """hot: cold; cold: hot; big: small; small: big; fast: slow; slow: fast; high: low; low:
        high; day: night; night: day; good: bad; bad: good; open: closed; up: down; down: up; left:
        right; right: left; old: young; young: old; rich: poor; poor: rich; happy: sad; sad: happy;
        wet: dry; dry: wet; light: dark; dark: light; hard: soft; soft: hard; full: empty; empty:
        full; near: far; far: near; early: late; late: early; strong: weak; weak: strong; true:
        false; false: true; long: short; short: long; clean: dirty; first: last; win: lose; love:
        hate; war: peace""",
    ),
    relation(
        "What is the plural of {x}?|Plural of {x}?|How do you write the plural of {x}?",
        "Tell me the plural of {x}.|Name the plural of {x}.",
        "The plural of {x} is {y}.",
        """mouse: mice; child: children; foot: feet; tooth: teeth; man: men; woman: women; goose:
        geese; ox: oxen; leaf: leaves; wolf: wolves; knife: knives; sheep: sheep; fish: fish; cat:
        cats; city: cities; box: boxes; person: people; wife: wives; baby: babies; house: houses""",
    ),
    relation(
        "What is the past tense of {x}?|Past tense of {x}?|What is the past of {x}?",
        "Tell me the past tense of {x}.|Name the past tense of {x}.",
        "The past tense of {x} is {y}.",
        """go: went; see: saw; eat: ate; run: ran; take: took; give: gave; come: came; write:
        wrote; speak: spoke; buy: bought; bring: brought; think: thought; fly: flew; swim: swam;
        sing: sang; drink: drank; begin: began; make: made; find: found; know: knew""",
    ),
    relation(
        "How do you say {x} in French?|What is {x} in French?|Translate {x} to French.",
        "What is the French word for {x}?",
        "In French, {x} is {y}.",
        """hello: bonjour; thank you: merci; yes: oui; no: non; cat: chat; dog: chien; house:
        maison; water: eau; bread: pain; book: livre; friend: ami; red: rouge; goodbye: au revoir;
        night: nuit""",
    ),
    relation(
        "How do you say {x} in German?|What is {x} in German?|Translate {x} to German.",
        "What is the German word for {x}?",
        "In German, {x} is {y}.",
        """hello: hallo; thank you: danke; yes: ja; no: nein; cat: Katze; dog: Hund; house: Haus;
        water: Wasser; bread: Brot; book: Buch; friend: Freund; red: rot; tree: Baum; night:
        Nacht""",
    ),
    relation(
        "How do you say {x} in Spanish?|What is {x} in Spanish?|Translate {x} to Spanish.",
        "What is the Spanish word for {x}?",
        "In Spanish, {x} is {y}.",
        """hello: hola; thank you: gracias; yes: sí; cat: gato; dog: perro; house: casa; water:
        agua; bread: pan; book: libro; friend: amigo; red: rojo; goodbye: adiós; tomorrow:
        mañana""",
    ),
    relation(
        "What does a {x} do?|What is the work of a {x}?|What is the job of a {x}?",
        "Tell me what a {x} does.",
        "A {x} {y}.",
        """baker: bakes bread; teacher: teaches children; doctor: helps sick people; farmer: grows
        food; pilot: flies planes; painter: paints pictures; writer: writes books; cook: cooks
        meals; miller: grinds grain into flour; tailor: sews clothes; carpenter: works with wood;
        fisherman: catches fish; nurse: cares for patients; gardener: cares for plants; judge:
        decides cases in court; dentist: treats teeth; sailor: sails ships; plumber: repairs pipes;
        librarian: looks after books; astronaut: travels into space""",
    ),
    relation(
        "How many {x}?|Do you know how many {x}?|Can you tell me how many {x}?",
        "Tell me how many {x}.|I want to know how many {x}.",
        "There are {y}.",
        """days are in a week: 7 days in a week; months are in a year: 12 months in a year; hours
        are in a day: 24 hours in a day; minutes are in an hour: 60 minutes in an hour; seconds are
        in a minute: 60 seconds in a minute; days are in a year: 365 days in a year; planets are in
        the solar system: 8 planets in the solar system; continents are there: 7 continents;
        letters are in the alphabet: 26 letters in the alphabet; sides does a triangle have: 3
        sides in a triangle; sides does a square have: 4 sides in a square; sides does a hexagon
        have: 6 sides in a hexagon; colors are in a rainbow: 7 colors in a rainbow; strings does a
        violin have: 4 strings on a violin; strings does a guitar have: 6 strings on a guitar; keys
        does a piano have: 88 keys on a piano; bits are in a byte: 8 bits in a byte; squares are on
        a chess board: 64 squares on a chess board; weeks are in a year: 52 weeks in a year;
        players are in a soccer team: 11 players in a soccer team; fingers does a hand have: 5
        fingers on a hand; bones does a person have: 206 bones in a grown person; degrees are in a
        circle: 360 degrees in a circle""",
    ),
    relation(
        "What is the {x}?|Which is the {x}?|Name the {x}.|What's the {x}?|Do you know the {x}?",
        "Tell me the {x}.|What do we call the {x}?",
        "The {x} is {y}.",
        """largest planet: Jupiter; smallest planet: Mercury; planet nearest to the sun: Mercury;
        red planet: Mars; planet with the brightest rings: Saturn; hottest planet: Venus; farthest
        planet from the sun: Neptune; third planet from the sun: Earth; first planet from the sun:
        Mercury; second planet from the sun: Venus; fourth planet from the sun: Mars; fifth planet
        from the sun: Jupiter; sixth planet from the sun: Saturn; seventh planet from the sun:
        Uranus; eighth planet from the sun: Neptune; star at the center of the solar system: the
        Sun; largest ocean: the Pacific; longest river in Africa: the Nile; largest river in South
        America: the Amazon; highest mountain: Mount Everest; highest mountain in Africa:
        Kilimanjaro; largest desert that is hot: the Sahara; largest country: Russia; smallest
        country: Vatican City; largest continent: Asia; smallest continent: Australia; coldest
        continent: Antarctica; largest island: Greenland; deepest lake: Lake Baikal; largest
        animal: the blue whale; tallest animal: the giraffe; fastest land animal: the cheetah;
        largest land animal: the elephant; largest bird: the ostrich; king of the animals: the
        lion; lightest element: hydrogen; hardest natural material: diamond; metal that is liquid
        at room temperature: mercury; main gas in air: nitrogen; gas that we breathe to live:
        oxygen; formula of water: H2O; formula of table salt: NaCl; freezing point of water: 0
        degrees Celsius; boiling point of water: 100 degrees Celsius; first month of the year:
        January; last month of the year: December; shortest month: February; largest organ of the
        body: the skin; organ that pumps blood: the heart; square root of 81: 9; square root of 64:
        8; number pi to two places: 3.14; first prime number: 2; highest waterfall: Angel Falls;
        speed of light: about 300000 kilometers per second; country of the pyramids: Egypt; city of
        the Eiffel Tower: Paris; city of the Colosseum: Rome; city of Big Ben: London; country of
        the Great Wall: China; country of the kangaroo: Australia; first person on the moon: Neil
        Armstrong; first person in space: Yuri Gagarin; first woman to win a Nobel Prize: Marie
        Curie""",
    ),
    relation(
        "What is {x}?|Explain {x}.|What do you know about {x}?|Describe {x}."
        "|Do you know what {x} is?",
        "Tell me what {x} is.|Please explain {x}.",
        "{x} is {y}.",
        """rain: water that falls from clouds; snow: frozen water that falls from clouds; ice:
        frozen water; steam: water as a hot gas; the moon: a ball of rock that circles the Earth;
        the sun: a star that gives us light and warmth; a star: a hot ball of gas that shines; a
        planet: a world that circles a star; a volcano: a mountain that can throw out hot rock; a
        river: water that flows to the sea; a desert: a dry place with little rain; an island: land
        with water all around; a mill: a building where grain is ground into flour; a water wheel:
        a wheel that is turned by flowing water; a bridge: a way over a river or a road; a library:
        a place with many books; a computer: a machine that follows instructions; a language model:
        a program that predicts the next word; a token: a small piece of text, such as a word or a
        part of it; a neural network: a program with many weights that learns from examples;
        electricity: the flow of tiny charges; gravity: the force that pulls things together; a
        magnet: a thing that attracts iron; bread: food that is baked from flour and water; honey:
        sweet food made by bees; wood: the hard part of trees; paper: a thin sheet made from wood;
        glass: a clear material made from sand; music: sound with rhythm and melody; a poem: a
        short text with rhythm; a clock: a thing that shows the time; a compass: a tool that shows
        where north is; a telescope: a tool to look at far things; a microscope: a tool to look at
        tiny things; a violin: an instrument with four strings; a whale: a very large animal of the
        sea; an owl: a bird that hunts at night; a bat: an animal that flies at night; a spider: a
        small animal with eight legs; a cactus: a plant that lives in dry places""",
    ),
)  # fmt: skip


def sentence(text: str) -> str:
    return with_articles(upper_first(text))


def fact(rng: Random, held: bool) -> Example:
    """One question; relations count by their size (softened), so that no table starves."""
    kind = rng.choices(RELATIONS, [len(r.rows) + 8 for r in RELATIONS])[0]
    x, y = rng.choice(kind.rows)
    return ask(kind, x, y, rng, held)


def ask(kind: Relation, x: str, y: str, rng: Random, held: bool) -> Example:
    """The question about row (x, y) of a relation, with a wording from the asked side."""
    known = [w for w in kind.questions.train if split_key(x + w) == held]
    wordings = known if known and (not held or rng.random() < 0.5) else kind.questions.held
    if not held and not known:
        wordings = kind.questions.train[:1]
    prompt = sentence(rng.choice(wordings).format(x=x))
    answer = sentence(kind.answer.format(x=x, y=y))
    want = upper_first(y) if kind.answer.startswith("{y}") else y
    return Example("facts", [user(roughen(rng, prompt)), assistant(answer)], "words", [want])


def fact_text(rng: Random) -> str:
    """A few facts of one table as plain text, for completion without a chat."""
    kind = rng.choice(RELATIONS)
    rows = rng.sample(kind.rows, min(4, len(kind.rows)))
    return " ".join(sentence(kind.answer.format(x=x, y=y)) for x, y in rows)


def fact_count() -> int:
    return sum(len(kind.rows) for kind in RELATIONS)
