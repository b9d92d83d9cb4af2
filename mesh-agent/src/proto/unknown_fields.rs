//! Finds fields that this agent does not know. prost drops them silently: a match made of one unknown condition would decode to
//! an empty match, which restricts nothing.

/// The messages of an authorization: which of their fields are known, and which of those are messages to look into.
#[derive(Clone, Copy)]
struct Shape {
    /// Highest known field number; all from 1 up to it are known, save those in `refused`.
    fields: u32,
    /// Known, but with a meaning that this agent does not: extensions.
    refused: &'static [u32],
    inside: &'static [(u32, &'static Shape)],
}

const EMPTY: Shape = Shape {
    fields: 0,
    refused: &[],
    inside: &[],
};
const STRING_MATCH: Shape = Shape {
    fields: 4,
    refused: &[],
    inside: &[(4, &EMPTY)],
};
const PAIR: Shape = Shape {
    fields: 2,
    refused: &[],
    inside: &[],
};
const MATCH: Shape = Shape {
    fields: 13,
    refused: &[13],
    inside: &[
        (1, &STRING_MATCH),
        (2, &STRING_MATCH),
        (3, &STRING_MATCH),
        (4, &STRING_MATCH),
        (5, &PAIR),
        (6, &PAIR),
        (7, &PAIR),
        (8, &PAIR),
        (11, &PAIR),
        (12, &PAIR),
    ],
};
/// Field 1 once was the way in which matches combine; whoever sends it means something.
const CLAUSE: Shape = Shape {
    fields: 2,
    refused: &[1],
    inside: &[(2, &MATCH)],
};
const RULE: Shape = Shape {
    fields: 1,
    refused: &[],
    inside: &[(1, &CLAUSE)],
};

const RULES: u32 = 5;
/// The last known field; an extension that we do not know may restrict.
const AUTHORIZATION_EXTENSIONS: u32 = 7;

/// What of an authorization is unknown.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Unknown {
    /// A part of the authorization itself.
    pub whole: bool,
    /// For each rule in order: a part of it.
    pub rules: Vec<bool>,
}

/// Looks through an encoded `istio.security.Authorization`. What does not parse counts as unknown.
pub fn of_authorization(bytes: &[u8]) -> Unknown {
    let mut unknown = Unknown::default();
    for field in Fields(bytes) {
        match field {
            Some((RULES, Some(rule))) => unknown.rules.push(has_unknown(rule, &RULE)),
            Some((number, _)) if number == 0 || number >= AUTHORIZATION_EXTENSIONS => unknown.whole = true,
            Some(_) => {}
            None => unknown.whole = true,
        }
    }
    unknown
}

/// The depth is that of the shapes: five.
fn has_unknown(bytes: &[u8], shape: &Shape) -> bool {
    Fields(bytes).any(|field| {
        let Some((number, payload)) = field else { return true };
        if number == 0 || number > shape.fields || shape.refused.contains(&number) {
            return true;
        }
        match shape.inside.iter().find(|(inside, _)| *inside == number) {
            Some((_, shape)) => payload.is_none_or(|payload| has_unknown(payload, shape)),
            None => false,
        }
    })
}

/// The fields of an encoded message: number, and the bytes where it is length-delimited. `None`, once and last, where the bytes
/// are no message.
struct Fields<'a>(&'a [u8]);

impl<'a> Iterator for Fields<'a> {
    type Item = Option<(u32, Option<&'a [u8]>)>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.0.is_empty() {
            return None;
        }
        let field = self.field();
        if field.is_none() {
            self.0 = &[];
        }
        Some(field)
    }
}

impl<'a> Fields<'a> {
    fn field(&mut self) -> Option<(u32, Option<&'a [u8]>)> {
        let tag = self.varint()?;
        let number = u32::try_from(tag >> 3).ok()?;
        let payload = match tag & 7 {
            0 => {
                self.varint()?;
                None
            }
            1 => {
                self.take(8)?;
                None
            }
            2 => {
                let length = usize::try_from(self.varint()?).ok()?;
                Some(self.take(length)?)
            }
            5 => {
                self.take(4)?;
                None
            }
            // Groups, which no version of these messages has.
            _ => return None,
        };
        Some((number, payload))
    }

    fn varint(&mut self) -> Option<u64> {
        let mut value = 0_u64;
        for shift in (0..64).step_by(7) {
            let (&byte, rest) = self.0.split_first()?;
            self.0 = rest;
            value |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Some(value);
            }
        }
        None
    }

    fn take(&mut self, length: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(length)?;
        self.0 = rest;
        Some(taken)
    }
}
