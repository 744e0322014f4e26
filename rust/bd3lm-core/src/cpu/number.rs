//! Numbers as they are stored, and e^x in float32.

/// A number as it is stored: `f32`, or the bits of a bf16 in an `i16`.
pub trait Stored: Copy + Send + Sync {
    /// Value in float32.
    fn get(self) -> f32;
    /// The nearest representable number.
    fn of(x: f32) -> Self;
}

impl Stored for f32 {
    #[inline(always)]
    fn get(self) -> f32 {
        self
    }

    #[inline(always)]
    fn of(x: f32) -> Self {
        x
    }
}

impl Stored for i16 {
    #[inline(always)]
    fn get(self) -> f32 {
        f32::from_bits(u32::from(self as u16) << 16)
    }

    /// Round to nearest, ties to even.
    #[inline(always)]
    fn of(x: f32) -> Self {
        let bits = x.to_bits();
        (bits.wrapping_add(0x7FFF + ((bits >> 16) & 1)) >> 16) as u16 as i16
    }
}

/// e^x for |x| <= 87 to about 1e-7. Fused multiplications round alike on every processor.
#[inline(always)]
pub(crate) fn exp_inside(x: f32) -> f32 {
    const LOG2_E: f32 = std::f32::consts::LOG2_E;
    const LN_2: f32 = std::f32::consts::LN_2;
    // Adding 1.5·2²³ rounds to an integer and leaves it in the low bits of the mantissa.
    const ROUND: f32 = 12_582_912.0;
    let shifted = x.mul_add(LOG2_E, ROUND);
    let r = x.mul_add(LOG2_E, ROUND - shifted);
    let mut p = 0.001_326_472_7_f32;
    for c in [0.009_671_513, 0.055_507_336, 0.240_222_42, LN_2, 1.0] {
        p = p.mul_add(r, c);
    }
    p * f32::from_bits((shifted.to_bits() << 23).wrapping_add(0x3F80_0000))
}

/// e^x for all x <= 0, by [`exp_inside`]: zero below -87; −∞ gives zero.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    if x > -87.0 { exp_inside(x) } else { 0.0 }
}
