"""What the project knows of words of everyday actions: which may describe the same moment.

A replaced word must make its query false, so a word must not be replaced by one that says the
same (*sofa*, *couch*), more or less (*dish*, *bowl*), or something that comes along with it anyway
(who *reads* also *looks*). A line of words is a group: none is exchanged for another. A line with a
colon relates its first word to each of the others, and not these to each other: *bed* and *sofa*
are told apart, *bed* and *furniture* are not. A line with ">" goes one way: who *eats* something
also *holds* it, so *eats* must not become *holds*, but *holds* may become *eats*.

Written for this project by hand; no annotation file was used.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from shine.language.words import Word

_PERSONS: Final = """
person people man woman boy girl guy lady child kid adult teenager baby toddler human individual
someone somebody male female gentleman player athlete actor actress dude fellow friend
mother father mom dad parent brother sister son daughter husband wife
"""

# They tell how another verb's act begins, goes on or ends, or what somebody thinks of it.
_LEADING: Final = """
start begin commence initiate continue proceed keep resume go come finish stop quit cease end
complete try attempt appear seem pretend decide want need like love hope plan intend prepare manage
happen tend help let
"""

# Verbs that have no object, that have one, and those whose object goes somewhere.
_OBJECTLESS: Final = """
sneeze cough yawn laugh giggle chuckle smile grin cry weep talk speak chat look stare gaze glance
awaken wake awake sleep nap doze snooze sit lie recline relax crouch kneel squat bend stoop lean
walk run jog step stroll wander go come arrive appear seem proceed return rise arise fall wait
linger remain work snore shout yell react dance
"""
_TRANSITIVE: Final = """
hold take throw grab get bring carry remove give fix pour grasp hug pick hang drop find use wear
make load toss fetch grip want need like love contain touch flip flick
"""
_PLACING: Final = """
put lay set place stick position
"""

_VERBS: Final = """
take grab get pick snatch seize grasp obtain retrieve fetch
take: have use bring carry collect gather remove lift receive
grab: reach catch clutch
pick: lift collect gather choose select
remove withdraw extract
pull drag tug yank draw
hold grip clutch clasp cradle
hold: carry have keep bear grasp grab take get lift handle touch hug
put > hold touch
throw > hold touch
pour > hold
eat > hold have sit
drink > hold have
read > hold sit
use > hold touch
play > hold
wash > hold touch stand
wipe > hold touch
fold > hold touch
open > hold touch
close > hold touch
fix > hold touch
tidy > hold
clean > hold
sweep > hold stand
vacuum > hold stand
cook > hold stand
write > hold sit
type > touch sit
wear > have
shake > hold
smell > hold
pull > hold touch
push > touch
stack > hold
load > hold
drop > hold
photograph > hold
turn > hold touch
knock > touch
awaken > lie sleep
wake > lie sleep
sleep > lie
snuggle > hold touch lie sit
watch > sit
study > sit
work > sit
dress > stand
undress > stand
enter > walk
leave > walk
carry bring transport
carry: move take
lift raise
shut close seal
close: slam push pull slide
open unlock uncover
open: pull push slide unwrap unfold undo read
look watch see stare gaze view observe peer glance peek
look: check inspect examine search study face read admire
check inspect examine
read study peruse
read: browse flip open
watch: enjoy study
search rummage hunt seek look
find discover locate
put place set lay deposit position
put: leave drop rest move stash store stow pack load stuff tuck insert
put: throw toss return replace pour hang wear don arrange organize stack
store stow stash
stuff tuck insert shove
return replace
wear don dress
undress strip
undress: remove take
throw toss fling chuck hurl pitch cast lob
throw: drop dump discard
drop release dump
drop: fall lose leave
sit perch seat
sit: rest relax lounge recline settle crouch
lie lay recline
lie: rest sleep nap lounge relax snuggle
sleep nap doze snooze
sleep: rest
rest relax lounge
wake awaken awake rouse
awaken: rise stir get sit
wake: rise get
stand rise arise
stand: wait pause remain pose get lean linger
wait pause linger remain
walk stroll wander amble stride step march
walk: go pace come move head proceed travel enter leave exit pass approach return
run jog sprint
run: rush dash race hurry hasten go come move enter leave exit
rush dash hurry hasten race
go move proceed travel head come
go: enter leave exit return
enter come arrive
enter: step
leave exit depart
leave: put place
return: come go
approach come
pass go
move shift relocate
move: carry push pull slide transfer drag
slide push pull
start begin commence initiate continue proceed keep resume try attempt decide appear seem want need
start: go come get
begin: go come get
stop finish end quit cease halt complete
stop: stand pause
continue keep proceed
appear seem
try attempt
eat consume munch devour dine
eat: chew bite taste nibble swallow snack finish
chew bite nibble
drink sip gulp chug guzzle
drink: swallow taste consume finish take
cook prepare make
cook: fry bake boil grill heat stir
make create build prepare
make: fix tidy
pour: fill empty spill
fill: load pack
stir mix blend whisk
wash rinse scrub
wash: clean bathe shower
clean wipe scrub tidy
clean: dust polish sweep mop vacuum dry rinse
tidy organize arrange straighten neaten
tidy: fix clean make fold
sweep brush
vacuum hoover
dry: wipe
wipe rub
brush comb groom
fix repair mend adjust
fix: straighten arrange tidy work
adjust straighten
laugh giggle chuckle cackle
laugh: smile
smile grin smirk
smile: laugh
cry weep sob
talk speak chat converse
talk: discuss say tell communicate call
shout yell scream
call phone dial
text type
play: use toy fiddle fidget
use operate utilize
use: work handle type play
work: type use write study
write scribble jot note
draw sketch
cough: sneeze
photograph shoot snap
photograph: take film capture
film record capture
take: photograph snap film record
turn rotate twist spin
turn: switch flip flick open light
switch flip flick
light ignite
hug embrace cuddle
snuggle cuddle
snuggle: hug hold lie wrap
wrap: cover
fold crease
unfold spread
hang suspend
bend lean
bend: crouch stoop
crouch squat kneel stoop
touch feel
touch: rub pat stroke press tap hold
pet stroke pat
knock tap bang
hit strike punch slap beat
push shove press
give hand pass offer
show present display
receive accept
smell sniff
jump hop leap
climb ascend
cut slice chop carve trim
tear rip
break smash crack
think ponder
stretch reach extend
undo untie unfasten
fasten buckle button zip tie
attach connect fasten
shake wave
rub: wipe
stack pile
grasp: reach
turn: spin
do: make perform work
let allow
want like love
"""

_NOUNS: Final = """
person individual human people someone somebody adult
man guy gentleman dude male boy husband father dad brother son
woman lady female girl wife mother mom sister daughter
child kid toddler baby boy girl teenager son daughter
sofa couch settee loveseat futon
lounge: sofa couch chair room
chair seat stool armchair
seat: sofa couch bench
furniture: sofa couch chair table bed desk cabinet shelf dresser wardrobe stool
bed mattress bunk cot
pillow cushion
blanket quilt comforter bedspread duvet throw
bedding: blanket sheet pillow quilt comforter duvet
cover: blanket sheet quilt lid
towel washcloth
cloth rag
cloth: towel napkin fabric clothes
fabric: cloth blanket towel curtain
table: desk counter tabletop surface
counter countertop worktop
surface: desk counter countertop
floor ground
rug carpet mat
floor: rug carpet
shelf shelve bookshelf rack bookcase ledge
cabinet cupboard
closet wardrobe armoire
cabinet: closet pantry locker dresser drawer shelf
cupboard: closet pantry
dresser drawer bureau
medicine medication drug
medicine: pill tablet vitamin aspirin water
pill tablet
laptop computer notebook pc
computer: desktop desk screen device machine
device: laptop phone camera tablet television
screen monitor
screen: television laptop phone
phone telephone cellphone cell mobile smartphone iphone
phone: call camera device
television tv telly
television: show movie program video screen
show movie film program video
picture photo photograph image
picture: portrait painting frame poster selfie
photo: selfie
camera camcorder
refrigerator fridge icebox
refrigerator: freezer
stove oven cooker range
pan pot skillet saucepan
kettle pot
cup mug
glass goblet tumbler
cup: glass
drink: water beverage coffee tea juice soda milk beer liquid wine cup glass bottle mug
liquid: water juice milk
water: glass cup bottle
coffee: cup mug
tea: cup mug
milk: glass
glass: glasses
glasses spectacles sunglasses eyeglass
bottle flask
food meal
food: snack sandwich lunch dinner breakfast supper dish bread fruit apple banana meat pizza chip
food: cereal cookie cake vegetable burger toast candy cracker plate bowl rice soup grocery
meal: lunch dinner breakfast supper sandwich
snack: chip cookie cracker candy sandwich food fruit
sandwich: bread burger toast bagel
bread: toast bagel
fruit: apple banana orange
grocery: food bag item
plate dish
dish: bowl cup glass plate food
cereal: bowl
bag sack
bag: backpack purse suitcase satchel pouch handbag luggage grocery package
backpack knapsack rucksack bookbag
purse handbag
box carton crate
box: container package case chest
container: jar tub tin box bottle bowl bag
package parcel
trash garbage rubbish waste litter
bin can trashcan dustbin wastebasket
trash: bin can
basket hamper
jar: lid
book textbook novel
book: notebook magazine page homework
magazine: newspaper paper book
paper document sheet page letter
paper: homework newspaper note mail notebook magazine
letter mail
homework schoolwork assignment
homework: book notebook
notebook notepad journal pad
pen pencil marker
clothes clothing laundry garment apparel outfit
clothes: shirt pants jacket coat sweater hoodie dress sock towel shoe item
clothing: shirt pants jacket coat sweater hoodie dress sock shoe item
laundry: towel shirt
shirt top blouse tshirt
jacket coat
sweater hoodie sweatshirt pullover
jacket: sweater hoodie sweatshirt
pants trousers jeans
shoe footwear
shoe: sneaker boot sandal slipper
hat cap
broom broomstick
broom: brush stick
vacuum hoover
vacuum: cleaner
door: doorway entrance entry entryway exit doorknob room
doorway entrance entry entryway
doorway: hallway hall room exit
doorknob knob handle
door: knob handle
hallway hall corridor
room: bedroom kitchen bathroom livingroom area space pantry closet basement garage office hallway
area: room kitchen
bed > bedroom room house home
bedroom > house home
pillow > bed
stove > kitchen
oven > kitchen
refrigerator > kitchen
sink > kitchen bathroom
dish > kitchen sink
counter > kitchen
cupboard > kitchen
kitchen > house home
bathroom > house home
toilet > bathroom
mirror > bathroom
shower > bathroom
television > room
sofa > room
couch > room
chair > room
table > room
desk > room office
window > room
closet > house home bedroom
doorway > house home
doorknob > doorway
hallway > house home
pantry > house home kitchen
garage > house home
office > house home
living > house home
washer > laundry
laptop > desk table
house home apartment
bathroom washroom restroom
bathroom: toilet shower
basement cellar
sink basin
sink: faucet tap water
faucet tap
tub bathtub bath
stair staircase step stairway stairs stairwell
window: pane curtain glass
curtain drape blind
mirror: reflection
light lamp
light: bulb lightbulb switch lantern
bulb lightbulb
lid top cap
hair: head
hand: finger arm palm
head: face hair
face: mouth nose eye
mouth: lip tooth
foot: feet toe leg shoe
dog puppy
cat kitten
pet animal
pet: dog puppy cat kitten
animal: dog puppy cat kitten
game videogame
toy: doll ball
ball: basketball football
car vehicle
bike bicycle
instrument: guitar piano drum
music song
item object thing something stuff
pile stack heap
piece bit slice part
piece: food bread sandwich cake fruit pizza
bite: piece sip
drink: sip
side edge
side: wall corner front back
end edge
"""

_MODIFIERS: Final = """
small little tiny short
big large huge giant
big: tall
quick fast rapid
quickly fast rapidly hastily hurriedly swiftly
slowly: carefully gently calmly
gently softly lightly
carefully: gently
happily cheerfully joyfully
sadly unhappily
loudly noisily
quietly silently
quietly: softly
happy glad cheerful
angry mad upset
sick ill
tired sleepy exhausted
messy dirty untidy
clean tidy neat
many several multiple few various
couple few several
red crimson scarlet
grey gray
back: again
away off
nearby near close
forward ahead
together: along
down downward downwards
up upward upwards
inside in indoors
outside out outdoors
around about
closed shut
open opened
adjacent next nearby near
front main
hot warm
cold cool
entire whole
"""

_PREPOSITIONS: Final = """
in into inside within
on onto upon atop
in: on at through
at: on in by near
to toward towards
to: into onto at for against
near by beside next alongside
around: near about
under beneath below underneath
over above across
behind: after
before: front
through: across into in
in > near by around
under > near by
behind > near by
inside > near by
into > near
away: back aside off
back: aside
over: around
from off out
out outside
up upward
down downward
from: with
on: along
for: at
by: with
against: on at
"""


def _entailed(*sections: str) -> dict[str, frozenset[str]]:
    found: dict[str, set[str]] = defaultdict(set)
    for line in "\n".join(sections).split("\n"):
        first, _, rest = line.partition(" > ")
        found[first].update(rest.split())
    return {word: frozenset(others) for word, others in found.items()}


def _related(*sections: str) -> dict[str, frozenset[str]]:
    related: dict[str, set[str]] = defaultdict(set)
    for line in "\n".join(sections).split("\n"):
        if ">" in line:
            continue
        first, colon, rest = line.partition(":")
        group = rest.split() if colon else first.split()
        for word in group:
            others = [first] if colon else group
            related[word].update(others)
            for other in others:
                related[other].add(word)
    return {word: frozenset(others - {word}) for word, others in related.items()}


_ACTORS: Final = frozenset(_PERSONS.split())
_LEADERS: Final = frozenset(_LEADING.split())
_WITHOUT_OBJECT: Final = frozenset(_OBJECTLESS.split())
_WITH_PLACE: Final = frozenset(_PLACING.split())
_WITH_OBJECT: Final = _WITH_PLACE | frozenset(_TRANSITIVE.split())
_NEAR: Final = {
    "VERB": _related(_VERBS),
    "NOUN": _related(_NOUNS),
    "PROPN": _related(_NOUNS),
    "ADJ": _related(_MODIFIERS),
    "ADV": _related(_MODIFIERS, _PREPOSITIONS),
    "ADP": _related(_MODIFIERS, _PREPOSITIONS),
}

_ENTAILED: Final = {
    "VERB": _entailed(_VERBS),
    "NOUN": _entailed(_NOUNS),
    "PROPN": _entailed(_NOUNS),
    "ADV": _entailed(_PREPOSITIONS),
    "ADP": _entailed(_PREPOSITIONS),
}
_LEAST_LETTERS: Final = 5  # of a word that may be a slip of another


def is_person(lemma: str) -> bool:
    """Whether a noun names a person and little more."""
    return lemma in _ACTORS


def leads(lemma: str) -> bool:
    """Whether a verb, with another after it, says little of what happens: "starts eating"."""
    return lemma in _LEADERS


def takes(verb: str, frame: str) -> bool:
    """Whether a verb can stand before such words; "sneezes a box" and "puts a box" are no English.

    Args:
        verb: dictionary form; one that is not known takes anything.
        frame: what follows it up to the next verb, as `neighbours.contexts` names it.
    """
    first, _, rest = frame.partition(" ")
    leading = leads(verb) and verb not in ("go", "come", "finish", "help")
    if leading and first.endswith("!"):
        return False
    has_object = first == "noun" or (first.endswith("!") and rest.startswith("noun"))
    if has_object:
        return verb not in _WITHOUT_OBJECT and (frame != "noun" or verb not in _WITH_PLACE)
    followed = first.startswith("VB") or (first == "to" and rest.startswith("VB"))
    return verb not in _WITH_OBJECT and (followed or not leading)


def near_synonyms(lemma: str, pos: str) -> frozenset[str]:
    """The other lemmas that may describe what `lemma` describes.

    Args:
        lemma: dictionary form in lower case.
        pos: universal part of speech; classes without groups have none.
    """
    return _NEAR.get(pos, {}).get(lemma, frozenset())


def content(words: Sequence[Word]) -> tuple[tuple[str, str], ...]:
    """(lemma, part of speech) of the words that tell what happens; who does it is left out."""
    return tuple(
        (word.lemma, word.pos) for word in words if word.pos in _NEAR and not is_person(word.lemma)
    )


@dataclass(frozen=True, slots=True)
class Meanings:
    """Which words may describe the same moment: this lexicon, and others beside it."""

    others: tuple[Callable[[str, str], frozenset[str]], ...] = ()  # each like `near_synonyms`

    def covers(self, lemma: str, other: str, pos: str) -> bool:
        """Whether `other` may be said wherever `lemma` is true: it makes no caption false.

        Args:
            lemma: dictionary form of what happens.
            other: dictionary form of the same part of speech.
            pos: universal part of speech of both.
        """
        return (
            lemma == other
            or other in near_synonyms(lemma, pos)
            or other in _ENTAILED.get(pos, {}).get(lemma, ())
            or _is_slip(lemma, other)
            or any(other in near(lemma, pos) or lemma in near(other, pos) for near in self.others)
        )

    def says(self, caption: Sequence[tuple[str, str]], query: Sequence[tuple[str, str]]) -> bool:
        """Whether `caption` says, in the same order and perhaps among more, all of `query`.

        Then the query is true wherever the caption is. Both are given by `content`.
        """
        rest = iter(caption)
        return all(any(self._alike(said, wanted) for said in rest) for wanted in query)

    def _alike(self, said: tuple[str, str], wanted: tuple[str, str]) -> bool:
        return said[0] == wanted[0] or (
            said[1] == wanted[1] and self.covers(said[0], wanted[0], said[1])
        )


def _is_slip(one: str, other: str) -> bool:
    """Whether one word is the other with a letter more or two exchanged: "sandwhich"."""
    short, long = sorted((one, other), key=len)
    if len(short) < _LEAST_LETTERS or len(long) - len(short) > 1:
        return False
    at = next((i for i, (a, b) in enumerate(zip(short, long, strict=False)) if a != b), len(short))
    if len(long) > len(short):
        return short[at:] == long[at + 1 :]
    return short[at : at + 2] == long[at : at + 2][::-1] and short[at + 2 :] == long[at + 2 :]


OWN: Final = Meanings()  # this lexicon alone
