//! Pods by uid as names of pins.

/// A Pod's uid as a name on the bpffs, which takes no dots: everything but letters, digits, `-` and `_` as `%` and two hex digits.
pub fn pin_name(pod_uid: &str) -> String {
    let escape = |byte: u8| match byte {
        b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' => char::from(byte).to_string(),
        _ => format!("%{byte:02x}"),
    };
    pod_uid.bytes().map(escape).collect()
}

/// The opposite of [`pin_name`].
pub fn pod_uid(pin_name: &str) -> String {
    let mut bytes = Vec::with_capacity(pin_name.len());
    let mut rest = pin_name;
    while let Some(first) = rest.bytes().next() {
        let escaped = if first == b'%' {
            rest.get(1..3).and_then(|hex| u8::from_str_radix(hex, 16).ok())
        } else {
            None
        };
        bytes.push(escaped.unwrap_or(first));
        rest = rest.get(if escaped.is_some() { 3 } else { 1 }..).unwrap_or("");
    }
    String::from_utf8_lossy(&bytes).into_owned()
}
