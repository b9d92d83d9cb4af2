//! Addresses in the programs: four words in network order, IPv4 as v4-mapped, the same 16 bytes as mesh-common's normal form.

use core::arch::asm;
use core::ffi::c_void;

use mesh_common::AddressBytes;

pub const AF_INET: u32 = 2;
pub const AF_INET6: u32 = 10;
pub const IPPROTO_TCP: u32 = 6;

/// The third word of a v4-mapped address.
const MAPPED: u32 = 0xffff_u32.to_be();

#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(transparent)]
pub struct Address(pub [u32; 4]);

impl Address {
    pub const LOOPBACK_V6: Address = Address([0, 0, 0, 1_u32.to_be()]);

    #[inline(always)]
    pub const fn from_v4(word: u32) -> Address {
        Address([0, 0, MAPPED, word])
    }

    #[inline(always)]
    pub fn bytes(self) -> AddressBytes {
        // SAFETY: both are 16 bytes of integers, in the same order.
        unsafe { core::mem::transmute::<[u32; 4], AddressBytes>(self.0) }
    }

    /// Reads an address out of a map value.
    ///
    /// # Safety
    /// `bytes` must lie on a multiple of four bytes, as every address of mesh-common's types does.
    #[inline(always)]
    pub unsafe fn read(bytes: *const AddressBytes) -> Address {
        let words = bytes.cast::<u32>();
        // SAFETY: by the contract; 16 bytes are four words.
        unsafe { Address([*words, *words.add(1), *words.add(2), *words.add(3)]) }
    }

    #[inline(always)]
    pub fn is_v4(self) -> bool {
        self.0[0] == 0 && self.0[1] == 0 && self.0[2] == MAPPED
    }

    /// 127/8 (also v4-mapped) and ::1.
    #[inline(always)]
    pub fn is_loopback(self) -> bool {
        if self.is_v4() {
            u32::from_be(self.0[3]) >> 24 == 127
        } else {
            self == Self::LOOPBACK_V6
        }
    }

    /// 0.0.0.0 (also v4-mapped) and ::, which mean loopback as a destination.
    #[inline(always)]
    pub fn is_unspecified(self) -> bool {
        self.0[3] == 0 && self.0[0] == 0 && self.0[1] == 0 && (self.0[2] == 0 || self.0[2] == MAPPED)
    }

    /// fe80::/10: its meaning depends on an interface that the connect hook does not see.
    #[inline(always)]
    pub fn is_link_local_v6(self) -> bool {
        u32::from_be(self.0[0]) >> 22 == 0xfe80 >> 6
    }
}

/// Reads one field of a context, exactly as wide as it is declared.
macro_rules! field {
    ($ctx:expr, $($field:tt)+) => {
        // SAFETY: the pointer is the program's context and the field lies in it; the verifier checks both.
        unsafe { core::ptr::read_volatile(&raw const (*$ctx).$($field)+) }
    };
}

/// Reads a word of a context at a fixed offset.
///
/// # Safety
/// `ctx` must be the program's context and have a readable word there; the verifier checks both.
#[inline(always)]
pub unsafe fn word<const OFFSET: usize>(ctx: *const c_void) -> u32 {
    let word: u64;
    // SAFETY: one load, by the contract. Written out, because the compiler merges the loads of two branches into one with a
    // computed address, which the verifier refuses for a context.
    unsafe {
        asm!("{word} = *(u32 *)({ctx} + {offset})", word = out(reg) word, ctx = in(reg) ctx, offset = const OFFSET, options(nostack, readonly));
    }
    word as u32
}

/// Reads an IPv6 address of a context of type `$type` word by word.
macro_rules! address_field {
    ($type:ty, $ctx:expr, $field:ident) => {{
        const OFFSET: usize = core::mem::offset_of!($type, $field);
        let ctx: *mut $type = $ctx;
        // SAFETY: the pointer is the program's context, and its type says where the field is.
        unsafe {
            $crate::address::Address([
                $crate::address::word::<OFFSET>(ctx.cast()),
                $crate::address::word::<{ OFFSET + 4 }>(ctx.cast()),
                $crate::address::word::<{ OFFSET + 8 }>(ctx.cast()),
                $crate::address::word::<{ OFFSET + 12 }>(ctx.cast()),
            ])
        }
    }};
}

/// Writes one field of a context.
macro_rules! set_field {
    ($ctx:expr, $value:expr, $($field:tt)+) => {{
        let value = $value;
        // SAFETY: as in `field!`; that the field may be written is the verifier's to check.
        unsafe { core::ptr::write_volatile(&raw mut (*$ctx).$($field)+, value) }
    }};
}

/// Writes an IPv6 address into a context word by word.
macro_rules! set_address_field {
    ($ctx:expr, $value:expr, $field:ident) => {{
        let value: $crate::address::Address = $value;
        $crate::address::set_field!($ctx, value.0[0], $field[0]);
        $crate::address::set_field!($ctx, value.0[1], $field[1]);
        $crate::address::set_field!($ctx, value.0[2], $field[2]);
        $crate::address::set_field!($ctx, value.0[3], $field[3]);
    }};
}

pub(crate) use {address_field, field, set_address_field, set_field};
