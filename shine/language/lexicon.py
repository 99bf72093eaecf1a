"""What the project knows of words of everyday actions: which may describe the same moment.

A replaced word must make its query false, so a word must not be replaced by one that says the
same (*sofa*, *couch*), less (*furniture*), or something that comes along with it anyway (who
*reads* also *looks*). Words of one group below are never exchanged for each other. The groups
overlap on purpose and the relation is not transitive: *bed* and *sofa* are told apart, *bed* and
*furniture* are not.

Written for this project by hand; no annotation file was used.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Final

from shine.language.tagging import Word

_PERSONS: Final = """
person people man woman boy girl guy lady child kid adult teenager baby toddler human individual
someone somebody male female gentleman player athlete actor actress dude fellow friend
mother father mom dad parent brother sister son daughter husband wife
"""

_VERBS: Final = """
take grab get pick fetch snatch seize grasp obtain collect gather retrieve lift remove pull
hold carry grip clutch grasp have keep bear cradle clasp
hold take grab get pick use lift bring
take bring carry
take have use
take remove withdraw extract pull
shut close seal slam
open unlock unseal uncover
open pull push slide
close push slam pull slide
look watch see stare gaze view observe peer glance peek face check eye
look inspect examine check search study survey
look read study
look admire smile
read study peruse browse flip
read hold open
watch sit view enjoy see
put place set lay leave deposit position drop rest
put stash store stow pack load stuff tuck insert shove
put throw toss
put return replace
put pour
put wear don
put hang
put arrange organize stack
wear dress don put
undress remove strip take
throw toss fling chuck hurl pitch cast lob
throw drop dump discard
drop release fall lose
drop put leave
sit rest relax lounge recline settle perch seat
sit crouch squat
lie lay rest recline sleep nap lounge relax snuggle
sleep nap doze snooze rest
wake awaken rouse stir rise
awaken wake get rise sit
stand rise get arise
stand wait pause stop lean linger remain pose
stand walk
get stand rise become obtain
walk go stroll pace wander step move march head stride come proceed travel amble return approach
run jog sprint rush dash race hurry hasten
run walk go move come enter leave
go move come leave travel head proceed
enter come walk go run step arrive
leave exit depart go walk run
leave put place
return come go
move shift carry push pull slide transfer drag go
start begin commence initiate proceed
start try attempt
stop finish end quit cease halt complete
continue keep proceed
appear seem look
try attempt
proceed go begin continue
eat consume chew bite munch devour taste nibble swallow snack have dine
drink sip gulp swallow taste consume have chug guzzle
drink hold take
eat hold take
cook prepare fry make bake boil grill heat
cook stir
make prepare cook create build fix form
pour fill spill empty
fill load pack
stir mix blend whisk
wash rinse clean scrub bathe shower
clean wipe dust scrub polish tidy wash sweep mop dry
tidy clean organize arrange straighten neaten fix
sweep brush clean
vacuum clean hoover sweep
dry wipe towel
wipe rub
brush comb groom
fix repair mend adjust
fix adjust straighten arrange
adjust change turn
laugh giggle chuckle smile grin smirk cackle
cry weep sob
talk speak chat converse discuss say tell communicate call
shout yell scream cry
call phone dial ring
phone text type
play use
play toy fiddle fidget
use work operate handle utilize type
work type
type write text
write draw scribble note jot sketch
draw sketch paint
sneeze cough
photograph shoot film record capture picture snap take
take snap photograph
film record
turn switch flip flick rotate twist spin
turn open
turn look
turn light
hug embrace hold snuggle cuddle squeeze hug
hug squeeze
snuggle cuddle hug hold lie
wrap cover
cover hide
fold crease bend
unfold spread open
hang suspend
hang put
lean rest bend
bend lean crouch stoop
crouch kneel squat
kneel squat
touch feel rub pat stroke press tap handle
touch hold play grab
pet stroke pat
knock tap hit beat bang
hit strike punch beat slap
kick hit
push shove press
pull tug drag draw yank
give hand pass offer
show present display
receive get accept
smell sniff
smile grin
wave gesture
dance move
jump hop leap skip bounce
climb ascend scale
descend climb
cut slice chop carve trim
tear rip
break smash crack shatter
wait stand pause
think ponder wonder
stretch reach extend
reach grab stretch get
search look rummage hunt seek
find discover locate
bring carry fetch take
set put place
light ignite
unwrap open
undo open unfasten untie
fasten tie zip button close buckle
tie lace fasten
attach fasten stick connect
pack fill load
wash clean
shake wave
cough sneeze
nod shake
straighten fix adjust
stack pile
tap touch
ride drive
swim float
spin turn rotate twirl
catch grab receive
pass go walk
approach walk go come
drag pull
place set
rub wipe
let allow
want like love
"""

_NOUNS: Final = """
sofa couch settee loveseat futon lounge
chair seat stool armchair
sofa seat chair couch armchair
bench seat
furniture sofa couch chair table bed desk cabinet shelf dresser wardrobe
bed mattress bunk cot
pillow cushion
blanket quilt cover comforter bedspread throw sheet bedding duvet
blanket bedding
towel cloth rag napkin washcloth
cloth fabric rag
table desk counter countertop surface
table tabletop
desk workstation
counter countertop worktop
floor ground rug carpet
rug carpet mat
shelf shelve bookshelf rack bookcase ledge
cabinet cupboard closet pantry locker wardrobe
closet wardrobe armoire
cabinet dresser drawer
dresser drawer bureau
medicine pill tablet drug medication vitamin aspirin
laptop computer notebook pc device machine
computer pc desktop device
computer screen monitor
phone telephone cellphone cell mobile smartphone device iphone
phone call
tablet ipad device
television tv screen telly show
television movie program film video
screen monitor display
remote controller control
picture photo photograph image portrait painting frame poster
picture photo selfie
photo camera
camera camcorder
camera phone
refrigerator fridge icebox freezer
stove oven cooker range burner
microwave oven
pan pot skillet saucepan
pot kettle
cup mug glass tumbler beaker
cup coffee tea water drink
glass water drink milk juice wine
glass goblet
glass glasses
glasses spectacles sunglasses eyeglass
bottle flask container
bottle water drink
drink water beverage coffee tea juice soda milk beer liquid wine
drink cup glass bottle mug
liquid water
coffee tea
food meal snack sandwich lunch dinner breakfast supper dish
food bread fruit apple banana meat pizza chips cereal cookie cake vegetable burger toast candy
food bowl plate
snack chip cookie cracker candy sandwich
sandwich bread burger toast bagel
bread toast
grocery food
groceries food
plate dish bowl saucer
dish cup glass plate bowl
bowl dish cereal
bag sack backpack purse suitcase satchel pouch handbag luggage
bag grocery package
backpack knapsack rucksack
box carton crate container package case chest parcel
box bag
basket bin hamper
trash garbage rubbish waste litter
trash bin can dustbin wastebasket
container jar tub tin
jar lid
book notebook novel magazine journal textbook
book homework page
magazine newspaper paper
notebook notepad pad journal
paper document letter note page sheet
paper homework
letter mail
homework assignment schoolwork
pen pencil marker
clothes clothing laundry garment outfit apparel
clothes shirt pants jacket coat sweater hoodie dress sock
clothing jacket shirt shoe
shirt top tshirt blouse t-shirt
jacket coat sweater hoodie sweatshirt
pants trousers jeans shorts
shoe sneaker boot footwear sandal slipper
sock stocking
hat cap
broom brush mop
broom sweeper stick
vacuum hoover cleaner
brush comb
sandal shoe
door doorway entrance doorknob entry entryway exit
door knob handle
doorknob handle knob
door room
doorway hallway entryway hall
hallway hall corridor passage
room bedroom kitchen bathroom livingroom
room area space place
house home apartment
garage shed
basement cellar
bathroom washroom restroom toilet
bathroom shower
pantry kitchen
kitchen stove
sink basin faucet tap
sink water
tub bathtub bath shower
stair staircase step stairway stairs stairwell
ladder step
window pane glass
curtain drape blind shade
window curtain
mirror reflection
light lamp bulb lightbulb
light switch
lamp lantern
lid cover top cap
fire fireplace
hair head
hand finger arm palm fist
face head mouth nose eye
head hair
foot feet leg toe
dog puppy animal pet
cat kitten animal pet
game videogame
toy doll
ball basketball football soccer
car vehicle
bike bicycle
guitar instrument
piano keyboard instrument
music song
item object thing something stuff
person individual human people someone somebody adult
man guy gentleman dude male boy husband father dad brother son
woman lady female girl wife mother mom sister daughter
child kid toddler baby boy girl teenager son daughter
wall side
corner side
front side
back side
side edge
end edge
"""

_MODIFIERS: Final = """
small little tiny short
big large huge giant tall
big small
quick fast rapid speedy
quickly fast rapidly hastily hurriedly swiftly
slowly carefully gently calmly
gently softly lightly carefully
happily cheerfully joyfully
sadly unhappily
loudly noisily
quietly silently softly
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
back again
away off
nearby near close
forward ahead
backward back
together along
down downward downwards
up upward upwards
inside in indoors
outside out outdoors
around about
closed shut
open opened
adjacent next nearby near
living dining
main front
long tall
hot warm
cold cool
entire whole full
different new
"""

_PREPOSITIONS: Final = """
in into inside within
on onto upon atop
on over
in at
on at
at to toward towards
to into onto in
near by beside next alongside around at
beside by next with
under beneath below underneath
over above across
behind after
before front
through across
through in
through into
from off out
out off from
out outside
up upward
down downward
across over
around about
with using
for to
against on
along down
towards toward
into on
by at
by with
during while
"""


def _related(*sections: str) -> dict[str, frozenset[str]]:
    related: dict[str, set[str]] = defaultdict(set)
    for line in "\n".join(sections).strip().splitlines():
        group = line.split()
        for word in group:
            related[word].update(group)
    return {word: frozenset(group - {word}) for word, group in related.items()}


_ACTORS: Final = frozenset(_PERSONS.split())
_NEAR: Final = {
    "VERB": _related(_VERBS),
    "NOUN": _related(_NOUNS),
    "PROPN": _related(_NOUNS),
    "ADJ": _related(_MODIFIERS),
    "ADV": _related(_MODIFIERS, _PREPOSITIONS),
    "ADP": _related(_MODIFIERS, _PREPOSITIONS),
}


def is_person(lemma: str) -> bool:
    """Whether a noun names a person and little more."""
    return lemma in _ACTORS


def near_synonyms(lemma: str, pos: str) -> frozenset[str]:
    """The other lemmas that may describe what `lemma` describes.

    Args:
        lemma: dictionary form in lower case.
        pos: universal part of speech; classes without groups have none.
    """
    return _NEAR.get(pos, {}).get(lemma, frozenset())


def same_meaning(lemma: str, other: str, pos: str) -> bool:
    """Whether two lemmas of one part of speech may describe the same thing."""
    return lemma == other or other in near_synonyms(lemma, pos)


def content(words: Sequence[Word]) -> tuple[tuple[str, str], ...]:
    """(lemma, part of speech) of the words that tell what happens; who does it is left out."""
    return tuple(
        (word.lemma, word.pos) for word in words if word.pos in _NEAR and not is_person(word.lemma)
    )


def says(caption: Sequence[tuple[str, str]], query: Sequence[tuple[str, str]]) -> bool:
    """Whether `caption` says, in the same order and perhaps among more, all that `query` says.

    Then the query is true wherever the caption is. Both are given by `content`.
    """
    rest = iter(caption)
    return all(any(_alike(said, wanted) for said in rest) for wanted in query)


def _alike(said: tuple[str, str], wanted: tuple[str, str]) -> bool:
    return said[0] == wanted[0] or (
        said[1] == wanted[1] and wanted[0] in near_synonyms(said[0], said[1])
    )
